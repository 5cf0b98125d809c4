"""What is refused as a whole is refused with the name of a part that works."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, ConvNet, fit, images
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calls.calls import Call
from lightning_quant.errors import ExportError
from lightning_quant.export.working_part import working_part
from lightning_quant.graph.table import Selection
from lightning_quant.recipe import recipe as recipes

INT8 = recipes.get("int8")


class Suppressing(nn.Module):
    """Drops what is below the best of what is left, one after the other, as a detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.gain = ConvNet(), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        order, kept = scores.amax(1).argsort(descending=True), []
        while order.numel() > 0:
            kept.append(order[0])
            order = order[1:][scores[order[1:]].amax(1) < 10]
        return self.gain(scores[torch.stack(kept)].unsqueeze(-1)).squeeze(-1)


def test_the_largest_part_that_exports_is_named(tmp_path: Path) -> None:
    x = images(4).tensors[0]
    with pytest.raises(ExportError, match=r"data-dependent .* Its child 'net', with 100% of the weights, works"):
        lq.quantize(Suppressing().eval(), calibration_data=[x], output_dir=tmp_path)
    part = working_part(nn.Sequential(Suppressing()).eval(), Call((x,)), INT8, "onnxruntime")
    assert part is not None
    assert (part.name, part.patterns) == ("0.net", "")


def test_callbacks_name_it_before_training(kind: Any, tmp_path: Path) -> None:
    module = Classifier(net=Suppressing())
    with pytest.raises(MisconfigurationException, match=r'A part of it works: `module="net.net"`, with 100% of its'):
        fit(module, kind(output_dir=tmp_path))
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("pattern", ["net.head", "*t*head", "net"])
def test_patterns_become_those_of_the_part(pattern: str) -> None:
    model, call = Suppressing().eval(), Call((images(4).tensors[0],))
    recipe = replace(INT8, overrides={"net.conv2": "int4_weights", "gain": "float"})
    part = working_part(model, call, recipe, "onnxruntime", Selection(exclude=("gain", pattern)))
    if pattern == "net":
        assert part is None
    else:
        assert part is not None
        assert part.patterns == ", exclude=('head',), recipe.overrides={'conv2': 'int4_weights'}"


def test_where_nothing_works_nothing_is_named() -> None:
    class Inner(Suppressing):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Flatten()
            self.gain = nn.Linear(1, 1)

    x = images(4).tensors[0]
    assert working_part(nn.Sequential(nn.Identity()), Call((x,)), INT8, "onnxruntime") is None
    assert working_part(Inner().eval(), Call((x.flatten(1)[:, :3],)), INT8, "no such runtime") is None
