"""Joins of tensors of unlike ranges stay float, where a grid for each part is to be had."""

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """Boxes and scores of two levels, joined within a level and over both, as detectors answer."""

    def __init__(self, factor: float, *, read: bool = False) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 5, 1)
        self.last = nn.Conv1d(9, 9, 1) if read else None
        with torch.no_grad():
            self.boxes.weight.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for features in (x := torch.relu(self.stem(x)), torch.relu(self.down(x))):
            scores = torch.sigmoid(self.scores(features)).flatten(2)
            levels.append(torch.cat([torch.relu(self.boxes(features)).flatten(2), scores], 1))
        joined = torch.cat(levels, 2)
        return joined.transpose(1, 2) if self.last is None else self.last(joined)


def joined(model: Head, runtime: str) -> tuple[list[str], list[str], Tensor, Tensor]:
    """Return actions and reasons of the joins, and what float and simulation answer."""
    prepared = prepare(model.eval(), (IMAGE,), runtime=runtime)
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    with torch.no_grad():
        expected = model(IMAGE)
        with prepared.attached("frozen"):
            actual = model(IMAGE)
    rows = [row for row in prepared.plan.rows if row.kind == "cat"]
    return [row.action for row in rows], [row.reason for row in rows], expected, actual


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_scores_keep_a_range_of_their_own_beside_boxes(runtime: str) -> None:
    torch.manual_seed(0)
    actions, reasons, expected, actual = joined(Head(3000), runtime)

    assert actions == ["float"] * 3
    assert all(reason.startswith("its parts' ranges are too unlike for one grid") for reason in reasons)
    assert signal_to_noise(expected[..., 4:], actual[..., 4:]) > 30
    assert signal_to_noise(expected[..., :4], actual[..., :4]) > 25


def test_parts_of_like_ranges_are_joined_in_integers() -> None:
    torch.manual_seed(0)
    actions, _, expected, actual = joined(Head(1.0), "onnxruntime")

    assert actions == ["int8"] * 3
    assert signal_to_noise(expected[..., 4:], actual[..., 4:]) > 20


def test_what_an_integer_operator_reads_has_one_grid_all_the_same() -> None:
    torch.manual_seed(0)
    assert joined(Head(3000, read=True), "onnxruntime")[0] == ["int8"] * 3
