"""Kernels serve tensors of a device that has them, and none elsewhere."""

import pytest
import torch

from lightning_quant.numerics import kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _as_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(kernels, "_INTERPRETED", False)


def test_tensors_of_a_gpu_are_served_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.serve(CUDA, torch.bfloat16)
    assert not kernels.serve(CUDA, torch.float64)
    assert not kernels.serve(CPU, torch.float32)
    assert not kernels.serve_values(torch.ones(3))
    monkeypatch.setattr(kernels, "_INTERPRETED", True)
    assert kernels.serve(CPU, torch.float32)
    assert kernels.serve_values(torch.ones(3))
    assert not kernels.serve_values(torch.ones(0))


def test_without_triton_or_under_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels.serve(CUDA, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert not kernels.serve(CUDA, torch.float32)
