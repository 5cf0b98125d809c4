"""What only moves values shares the grid of what it moves, however it is written."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.simulate.prepared import Prepared

IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda x: x.chunk(2, 1)[1].repeat(1, 2, 1, 1),
    "split": lambda x: torch.split(x, [2, 6], dim=1)[0].tile(1, 4, 1, 1),
    "unbind": lambda x: x.unflatten(3, (5, 1)).unbind(4)[0],
    "slice": lambda x: x[..., ::2, 1:-1],
    "narrow": lambda x: x.narrow(2, 1, 3),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "permute": lambda x: x.movedim(2, 3).swapaxes(2, 3).permute(0, 1, 3, 2),
    "repeat": lambda x: x.repeat(1, 1, 2, 1).repeat_interleave(2, dim=3),
    "upsample": nn.Upsample(scale_factor=2),
    "interpolate": lambda x: F.interpolate(x, size=(9, 7)),
    "nearest-exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "shuffle": lambda x: torch.channel_shuffle(F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 4),
    "zeros": lambda x: F.pad(F.pad(x, (-1, 1)), (1, 1, 0, 2)).contiguous(),
    "reflect": nn.ReflectionPad2d((1, 2, 0, 1)),
    "replicate": lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "circular": lambda x: F.pad(x, (1, 2, 0, 1), "circular"),
}


class Moved(nn.Module):
    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.move = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 4, 1), move

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.move(F.relu(self.first(x))))


def ready(model: nn.Module, *args: Tensor, runtime: str = "onnxruntime") -> Prepared:
    prepared = prepare(model.eval(), args, observer="min_max", runtime=runtime)
    calibrate(prepared, steps_of(prepared, [args]))
    return prepared


def agreement(prepared: Prepared, *args: Tensor) -> float:
    """Return how far the exported form is from the simulated one, in decibels; both compute the same integers."""
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = prepared.root(*args)
    return signal_to_noise(simulated, convert(prepared)(*args))


def read_by(prepared: Prepared, key: str) -> str:
    """Return the edge whose grid an operator's input has."""
    (graph,) = prepared.plan.graphs
    (operator,) = (operator for operator in graph.operators if operator.key == key)
    return next(edge.group for edge in graph.edges if edge.key == operator.inputs[0])


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_values_shares_their_grid(name: str) -> None:
    prepared = ready(Moved(MOVES[name]), IMAGE)
    assert read_by(prepared, "second") == "relu"
    assert agreement(prepared, IMAGE) > 100


@pytest.mark.parametrize(
    "move",
    [
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.pad(x, (1, 1, 1, 1), value=3.0),
        nn.ConstantPad2d(1, -2.0),
        nn.UpsamplingBilinear2d(scale_factor=2),
    ],
    ids=["bilinear", "function", "layer", "upsampling"],
)
def test_what_makes_values_has_a_grid_of_its_own(move: Callable[[Tensor], Tensor]) -> None:
    assert read_by(ready(Moved(move), IMAGE), "second") != "relu"


def test_joins_behind_splits_and_upsampling_are_integer() -> None:
    class Neck(Moved):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            left, right = x.chunk(2, 1)
            return self.second(torch.cat([right, F.interpolate(left[:, :, ::2, ::2], x.shape[2:])], 1))

    prepared = ready(Neck(nn.Identity()), IMAGE)
    (row,) = (row for row in prepared.plan.rows if row.kind == "cat")
    assert row.action == "int8"
    assert agreement(prepared, IMAGE) > 100


def test_parts_of_one_linear_layer_have_grids_of_their_own() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.first, self.second = nn.Linear(6, 12), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.both(x).chunk(2, -1)
            return self.first(value) * self.second(gate).softmax(-1)

    prepared = ready(Gated(), torch.randn(4, 6))
    assert read_by(prepared, "first") != read_by(prepared, "second")


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_that_pads_with_its_input_is_one_behind_that_padding(kind: type[nn.Module], mode: str) -> None:
    places = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    torch.manual_seed(0)
    x = torch.randn(2, 3, *[6] * places)
    model = nn.Sequential(kind(3, 4, 3, padding=1, padding_mode=mode), nn.ReLU(), kind(4, 2, 3))
    prepared = ready(model, x)
    assert prepared.plan.coverage == 1.0

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(kind(3, 4, 3), nn.ReLU(), kind(4, 2, 3))
            self.layers.load_state_dict(model.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(F.pad(x, (1, 1) * places, mode=mode))

    torch.testing.assert_close(convert(prepared)(x), convert(ready(Padded(), x))(x), atol=1e-6, rtol=0)
    assert agreement(prepared, x) > 100


def test_channels_that_were_moved_are_not_scaled_as_if_they_were_not() -> None:
    from lightning_quant.calibrate.groups import scaling_groups

    kept = scaling_groups(ready(Moved(nn.Upsample(scale_factor=2)), IMAGE))
    moved = scaling_groups(ready(Moved(lambda x: x.flip(1)), IMAGE))
    assert [len(group.edges) for group in kept if group.producers and group.consumers] == [2]
    assert not [group for group in moved if group.producers and group.consumers]
