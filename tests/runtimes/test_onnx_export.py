"""ONNX files hold weights as they are stored."""

from pathlib import Path

import onnx
import pytest
import quick_exports
import torch
from models import CASES, calibrated
from quick_exports import export_anew
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.export.export import export

_TYPES = {"int8_weight_only": "int8", "float16": "float16"}


class _Small(nn.Module):
    """Weights of fewer values than PyTorch's exporter computes with when it writes a file."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.conv, self.head = nn.LSTM(16, 24, batch_first=True), nn.Conv1d(24, 16, 3), nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.lstm(x)[0].transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("recipe", sorted(_TYPES))
def test_small_weights_are_written_as_they_are_stored(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Small().eval()
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    artifact = lq.quantize(model, recipe, "onnxruntime", calibration_data=[x], output_dir=tmp_path, threads=1)
    smallest = min(p.numel() for p in model.parameters() if p.dim() > 1)
    large = [
        t for t in onnx.load(artifact.model_path).graph.initializer if onnx.numpy_helper.to_array(t).size >= smallest
    ]
    written = {onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name for tensor in large}
    assert written == {_TYPES[recipe]}
    assert len(large) == 4
    with torch.no_grad():
        error = lq.load(tmp_path)(x) - model(x)
    assert error.square().mean().sqrt() < 0.05 * model(x).square().mean().sqrt()


class _Entropy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        share = self.layer(x).relu()
        return share * torch.log(share + 1e-15)


def test_small_numbers_that_keep_a_logarithm_finite_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Entropy().eval(), torch.randn(16, 6)
    lq.quantize(model, calibration_data=[x], output_dir=tmp_path, threads=1)
    assert lq.load(tmp_path)(x).isfinite().all()


def test_rules_of_the_rewriter_are_tried_on_their_own_operators_alone() -> None:
    """Each on every node made up nearly half of the time of a transformer's export."""
    import onnx_ir as ir
    from onnxscript import rewriter

    from lightning_quant.runtimes._onnx_export import _Rule

    tried = []
    for rule in map(_Rule, rewriter._DEFAULT_REWRITE_RULES):
        node = ir.node("Gelu", [ir.val("x")])
        tried.append(rule.operator is None)
        assert rule.operator is None or rule.try_rewrite(None, None, node) is None
    assert not all(tried)


@pytest.mark.parametrize("net", ["residual", "multi_modal", "pooling", "tied"])
def test_modules_that_differ_in_weights_and_scales_are_exported_once_to_what_they_would_be_anew(
    net: str, tmp_path: Path
) -> None:
    model, prepared = calibrated(next(case for case in CASES if case.name == net))
    written = [export(prepared, tmp_path / "first").model_path.read_bytes()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    for observer in prepared.ranges.observers.values():
        observer.high *= 1.25
    known = len(quick_exports._written)
    written.append(export(prepared, tmp_path / "again").model_path.read_bytes())

    assert len(quick_exports._written) == known
    export_anew()
    written.append(export(prepared, tmp_path / "anew").model_path.read_bytes())
    assert written[0] != written[1] == written[2]
