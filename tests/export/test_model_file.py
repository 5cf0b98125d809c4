"""A model file in which as much may vary as works, one try after the other."""

from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from prepared_graphs import evaluated
from torch import nn

from lightning_quant.errors import ExportError
from lightning_quant.export import model_file
from lightning_quant.export.model_file import export_float, float_outputs, write_model

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
BATCH: dict[str, dict[int, str]] = {"input": {0: "batch"}}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return evaluated(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), X)


def test_the_first_that_works_is_taken_and_what_did_not_is_kept_with_its_reason(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = model_file._export_module

    def refuse_a_free_batch(model: Any, converted: Any, staged: Path, dynamic: Any) -> None:
        if dynamic:
            raise ExportError("the batch is fixed")
        exported(model, converted, staged, dynamic)

    converted, output = model.converted(static_sizes=True)
    written = write_model(model, converted, output, tmp_path / "model.onnx", [BATCH, {}])
    assert (written.dynamic, model.refused) == (BATCH, ())
    assert written.loaded(X[:2]).shape == (2, 2)
    assert written.agreement_db > 40

    monkeypatch.setattr(model_file, "_export_module", refuse_a_free_batch)
    written = write_model(model, converted, output, tmp_path / "model.onnx", [BATCH, {}])
    assert written.dynamic == {}
    assert model.refused == ((BATCH, "the batch is fixed"),)
    with pytest.raises(ExportError, match="the batch is fixed"):
        write_model(model, converted, output, tmp_path / "model.onnx", [BATCH])


def test_a_file_that_is_wrong_for_few_samples_has_the_captured_sizes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = type(model.runtime).load

    def wrong_for_few(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        run = loaded.run
        loaded.run = lambda tensors: [out * (0.8 if len(out) < 5 else 1) for out in run(tensors)]
        return loaded

    monkeypatch.setattr(type(model.runtime), "load", wrong_for_few)
    converted, output = model.converted(static_sizes=True)
    written = write_model(model, converted, output, tmp_path / "model.onnx", [BATCH, {}])
    assert written.dynamic == {}
    ((refused, why),) = model.refused
    assert refused == BATCH
    assert "what onnxruntime computes is 14.0 dB from what was exported" in why


def test_the_float_peer_is_a_file_of_the_same_runtime(model: Any, tmp_path: Path) -> None:
    model.exported = BATCH
    path = export_float(model, tmp_path, model.runtime)

    assert path.name == f"float_{model.runtime.MODEL_FILE}"
    assert not any("Quantize" in name for name in model.runtime.count_operators(path))
    (answer,) = float_outputs(model, [X])
    assert torch.equal(answer, model.root(X))
