import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import load, quantize, verify
from lightning_quant.calls.calls import Call
from lightning_quant.errors import NoEffectWarning
from lightning_quant.measure.output_noise import HeldOut, Noise, channel_axis, drawn_outputs, held_back, measure_noise

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


class Answering(nn.Module):
    """Answers with what a function makes of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def noise(floating: Any, artifact: Any, x: Tensor = X) -> Noise:
    return measure_noise(Answering(floating), Answering(artifact), HeldOut((((x,), {}),), "a call"))


def test_a_lost_column_is_named_inside_an_output_that_is_well() -> None:
    def boxes_and_scores(x: Tensor) -> Tensor:
        return torch.cat([640 * x, torch.sigmoid(x)], 1)

    def on_one_grid(x: Tensor) -> Tensor:
        return (boxes_and_scores(x) / 8).round() * 8

    found = noise(boxes_and_scores, on_one_grid)
    (output,), (text,) = found.outputs, found.warnings()

    assert output.db > 30
    assert output.channel_db == pytest.approx(0.0, abs=0.1)
    assert output.channel in (3, 4, 5)
    assert text.startswith(
        f"channel {output.channel} of output `output` (dimension 1) is 0.0 dB from float, mostly noise"
    )
    assert f"{output.channel} of dimension 1" in str(found)
    assert str(found).endswith("On a call.")
    assert found.scalars() == {
        "snr_db": output.db,
        "worst_channel_db": output.channel_db,
        "equal_predictions": output.equal,
    }


def test_every_output_counts_for_itself() -> None:
    found = noise(lambda x: {"large": 1000 * x, "small": x}, lambda x: {"large": 1000 * x, "small": 2 * x})

    assert [(output.name, output.db) for output in found.outputs] == [("large", math.inf), ("small", 0.0)]
    assert found.warnings() == ["output `small` is 0.0 dB from float, mostly noise"]
    assert found.scalars()["snr_db"] == found.scalars()["snr_db/small"] == 0.0
    assert found.scalars()["snr_db/large"] == 200.0
    assert "identical" in str(found)


@pytest.mark.parametrize(
    ("floating", "artifact"),
    [
        (torch.zeros_like, torch.zeros_like),
        (lambda x: 1e-40 * x, torch.zeros_like),
        (lambda x: torch.cat([x, torch.zeros_like(x)], 1), lambda x: torch.cat([x, 1e-6 * x], 1)),
        (torch.ones_like, torch.ones_like),
        (lambda x: x > 0, lambda x: x > 0.1),
        (lambda x: x[x[:, 0] > 0], lambda x: x[x[:, 0] > 0.1]),
        (lambda x: x[:0], lambda x: x[:0]),
        (lambda x: x.masked_fill(x > 1, -math.inf), lambda x: x.masked_fill(x > 1, -math.inf)),
        (lambda x: x.sum(), lambda x: x.sum()),
        (lambda x: (x * 100).long(), lambda x: (x * 100).long()),
    ],
    ids=[
        "zeros",
        "denormal",
        "zero column",
        "constant",
        "boolean",
        "rows by value",
        "empty",
        "mask",
        "number",
        "integers",
    ],
)
def test_what_has_no_noise_has_no_warning(floating: Any, artifact: Any) -> None:
    found = noise(floating, artifact)

    assert found.warnings() == []
    assert all(math.isfinite(value) for value in found.scalars().values())
    str(found)


def test_other_predictions_are_a_warning() -> None:
    scores = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    other = scores + 0.5 * torch.randn(64, 10, generator=torch.Generator().manual_seed(2))
    (text,) = [t for t in noise(lambda _: scores, lambda _: other).warnings() if "predictions" in t]

    assert text.endswith("of the predictions of output `output` are those of float")


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8,), None),
        ((8, 5), 1),
        ((8, 20, 5), 2),
        ((8, 5, 20), 1),
        ((8, 16, 7, 7), 1),
        ((8, 7, 7, 16), 3),
        ((8, 3, 20, 20, 85), 4),
        ((8, 4, 5, 6, 7), 1),
    ],
)
def test_channels_are_where_they_usually_are(shape: tuple[int, ...], axis: int | None) -> None:
    assert channel_axis(torch.zeros(shape)) == axis


@pytest.mark.parametrize(("number", "least", "left"), [(1, 1, 0), (2, 1, 1), (2, 2, 0), (3, 2, 1), (0, 1, 0)])
def test_the_last_call_is_held_back_where_enough_are_left(number: int, least: int, left: int) -> None:
    held: list[Any] = []
    calls: Any = list(range(number))

    assert list(held_back(calls, least, held)) == calls[: number - left]
    assert held == calls[number - left :]


class Loud(nn.Module):
    """One channel of the input drowns the others on their common grid."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_noise_is_measured_on_a_call_that_chose_no_range_and_warned_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Loud().eval()
    with torch.no_grad():
        model.layers[0].weight[:, 0] = 0
    calls = [X * torch.tensor([1e5, 1.0, 1.0]), X[:32] * torch.tensor([0.0, 1.0, 1.0])]
    with pytest.warns(NoEffectWarning, match=r"output `output` is .* dB from float, mostly noise. Try recipe"):
        artifact = quantize(model, calibration_data=calls, output_dir=tmp_path / "q", threads=1)
    report: Any = artifact.report
    with torch.no_grad():
        expected, actual = model(calls[1]), load(artifact.path)(calls[1])

    assert report["noise"]["base"] == "the last call, which took no part in calibration"
    assert report["scalars"]["quant/snr_db"] == pytest.approx(
        float(10 * torch.log10(expected.square().sum() / (expected - actual).square().sum())), abs=0.01
    )
    assert "| output, float against artifact |" in artifact.report_path.read_text()
    single = quantize(model, calibration_data=calls[:1], output_dir=tmp_path / "single", threads=1)
    assert single.report["noise"]["base"] == "the captured call, which took part in the choice of ranges"


@pytest.mark.parametrize("recipe", ["int8", "int8_weight_only"])
def test_rows_that_depend_on_values_are_exported_and_compared_where_they_can_be(recipe: str, tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.body(x)
            return rows[rows[:, 4] > 0]

    torch.manual_seed(0)
    artifact = quantize(Masked().eval(), recipe, calibration_data=[X, X[:32]], output_dir=tmp_path / "q", threads=1)
    report: Any = artifact.report

    assert report["scalars"]["quant/parity_failed"] == 0
    assert report["noise"]["outputs"][0]["name"] == "output"
    assert verify(artifact.path).failures == []


def test_outputs_of_random_numbers_are_named() -> None:
    def sampled(x: Tensor) -> dict[str, Tensor]:
        return {"mean": x, "sample": x + torch.randn_like(x)}

    before = torch.random.get_rng_state()
    assert drawn_outputs(Answering(sampled), Call((X,))) == ["sample"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn_outputs(Answering(lambda x: torch.where(x > 0, x, torch.nan)), Call((X,))) == []


def test_images_of_the_sizes_of_an_input_are_no_predictions() -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (again,) = noise(lambda x: 2 * x, lambda x: 2 * x + 0.5, images).outputs
    (scores,) = noise(lambda x: x[..., 1:], lambda x: x[..., 1:], images).outputs
    assert again.equal is None
    assert scores.equal == 1.0
