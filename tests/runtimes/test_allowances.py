"""What forwards do that exporters do not follow, and that changes no result."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq


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


@pytest.mark.parametrize(("recipe", "runtime"), [("int8_dynamic", "onnxruntime"), ("int8_weight_only", "torch")])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "copies"])
def test_exports(kind: str, recipe: str, runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (_Copying() if kind == "copies" else _Masked(kind)).eval()
    calls = [torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    artifact = lq.quantize(model, recipe, runtime, calibration_data=calls, output_dir=tmp_path, threads=1)

    loaded = lq.load(artifact.path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(calls[1]), model(calls[1]), rtol=0.0, atol=0.1)
