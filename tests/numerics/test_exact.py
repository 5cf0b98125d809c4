"""Float32 is computed in full while a block runs, and as before afterwards."""

import pytest
import torch

from lightning_quant.numerics.exact import exact_arithmetic


def settings() -> tuple[bool, ...]:
    matmul = torch.backends.cuda.matmul
    return (
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.allow_tf32,
        bool(matmul.allow_fp16_reduced_precision_reduction),
        bool(matmul.allow_bf16_reduced_precision_reduction),
    )


def test_nothing_but_full_precision_is_allowed_inside_and_all_is_put_back() -> None:
    before = settings()
    with pytest.raises(KeyError), exact_arithmetic():  # noqa: PT012
        assert settings() == (False,) * 4
        assert torch.get_float32_matmul_precision() == "highest"
        raise KeyError
    assert settings() == before
    assert any(before)


def test_a_precision_that_was_chosen_before_comes_back() -> None:
    chosen = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with exact_arithmetic():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(chosen)
