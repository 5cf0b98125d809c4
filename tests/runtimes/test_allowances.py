"""What forwards do that exporters do not follow, and that changes no result."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.errors import ExportError


class _Masked(nn.Module):
    """Gives PyTorch's transformers a mask that they look into."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head, self.kind = nn.Linear(3, 16), nn.Linear(16, 2), kind
        layers = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
        stacks = {"encoder": nn.TransformerEncoder, "decoder": nn.TransformerDecoder}
        self.stack = stacks[kind](layers[kind](16, 2, 32, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), diagonal=1)
        x = self.embed(x)
        return self.head(self.stack(x, mask=mask) if self.kind == "encoder" else self.stack(x, x, tgt_mask=mask))


class _Copying(nn.Module):
    """Makes a module in its forward, which copies the defaults of its state as metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        defaults = {"offset": torch.zeros(2), "same": None}
        defaults["same"] = defaults["offset"]
        copied = copy.deepcopy(defaults)
        assert copied["same"] is copied["offset"]
        return self.second(torch.relu(self.first(x))) + copied["offset"]


class _Looking(_Copying):
    """Keeps an array of what it has seen, which projects show after training."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        self.seen = y.mean(dim=0).detach().cpu().numpy()
        return y


class _Computing(_Looking):
    """Computes with that array."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(self.seen.mean())


def test_an_array_that_is_computed_with_is_not_taken_for_one_that_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"`.mean` of a NumPy array is needed.*return super\(\).forward\(x\)"):
        lq.quantize(_Computing().eval(), "int8", "torch", calibration_data=[torch.randn(4, 6, 3)], output_dir=tmp_path)


@pytest.mark.parametrize(("recipe", "runtime"), [("int8_dynamic", "onnxruntime"), ("int8_weight_only", "torch")])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "copies", "arrays"])
def test_exports(kind: str, recipe: str, runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {"copies": _Copying, "arrays": _Looking}
    model = (own[kind]() if kind in own else _Masked(kind)).eval()
    calls = [torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    artifact = lq.quantize(model, recipe, runtime, calibration_data=calls, output_dir=tmp_path, threads=1)

    assert "into_only" not in artifact.manifest
    loaded = lq.load(artifact.path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(calls[1]), model(calls[1]), rtol=0.0, atol=0.1)
