import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.grid import Grid
from lightning_quant.ranges.observers import (
    OBSERVERS,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    build,
)
from lightning_quant.recipe.recipe import IntegerSpec, Recipe

NAMES = sorted(OBSERVERS)


def batches() -> list[Tensor]:
    """Batches that grow, so that every histogram must widen its span several times, to both sides."""
    return [torch.randn(100, 7) * scale + shift for scale, shift in ((0.01, 0), (1, 0.5), (0.1, -9), (20, 0), (3, 90))]


def seen_by(observer: Observer, data: list[Tensor]) -> Observer:
    for batch in data:
        observer.update(batch)
    return observer


def ends(observer: Observer) -> tuple[float, float]:
    low, high = observer.range()
    assert low.dtype == high.dtype == torch.float32
    assert low.dim() == high.dim() == 0
    return low.item(), high.item()


def rounding_error(data: np.ndarray, low: float, high: float, levels: int = 256) -> float:
    """Mean squared error of quantizing with a range, straight from the definition."""
    scale = (max(high, 0) - min(low, 0)) / (levels - 1)
    zero_point = np.rint(-min(low, 0) / scale)
    integers = np.clip(np.rint(data / scale) + zero_point, 0, levels - 1)
    return float(np.mean(((integers - zero_point) * scale - data) ** 2))


# --- each observer against its definition


def test_min_max_is_the_extremes_of_everything() -> None:
    data = batches()
    everything = np.concatenate([batch.numpy().ravel() for batch in data])
    assert ends(seen_by(MinMax(), data)) == (everything.min(), everything.max())


@pytest.mark.parametrize("momentum", [0.05, 0.5])
def test_moving_average_is_a_mean_at_first_and_then_exponential(momentum: float) -> None:
    data = [torch.randn(50) * scale for scale in torch.linspace(1, 4, 40)]
    low = high = None
    for number, batch in enumerate(data):
        weight = max(momentum, 1 / (number + 1))
        batch_low, batch_high = batch.min().item(), batch.max().item()
        low = batch_low if low is None else (1 - weight) * low + weight * batch_low
        high = batch_high if high is None else (1 - weight) * high + weight * batch_high
        if number == 2 and momentum < 1 / 3:
            observed = seen_by(MovingAverage(momentum), data[:3])
            assert ends(observed)[1] == pytest.approx(np.mean([b.max().item() for b in data[:3]]), rel=1e-5)
    assert ends(seen_by(MovingAverage(momentum), data)) == pytest.approx((low, high), rel=1e-5)


def test_moving_average_forgets_where_min_max_does_not() -> None:
    data = [torch.tensor([-100.0, 100.0])] + [torch.randn(100).clamp(-3, 3) for _ in range(200)]
    assert ends(seen_by(MovingAverage(), data))[1] < 4
    assert ends(seen_by(MinMax(), data))[1] == 100


@pytest.mark.parametrize("percentile", [99.99, 99.0, 60.0])
def test_percentile_agrees_with_numpy_within_a_bin(percentile: float) -> None:
    data = [torch.randn(4000) ** 3 for _ in range(5)]
    everything = np.concatenate([batch.numpy() for batch in data])
    observer = seen_by(Percentile(percentile), data)
    tail = (100 - percentile) / 2
    width = ((observer.span_high - observer.span_low) / observer.NUM_BINS).item()
    expected = np.percentile(everything, [tail, 100 - tail])
    np.testing.assert_allclose(ends(observer), expected, atol=1.01 * width, rtol=0)
    low, high = ends(observer)
    assert np.mean((everything >= low) & (everything <= high)) >= percentile / 100 - 1e-9


def test_percentile_leaves_outliers_out_and_min_max_does_not() -> None:
    data = [torch.cat([torch.rand(99_999), torch.tensor([50.0])])]
    assert ends(seen_by(Percentile(99.99), data))[1] < 1.1
    assert ends(seen_by(Percentile(100.0), data)) == pytest.approx(ends(seen_by(MinMax(), data)))


@pytest.mark.parametrize("percentile", [50, 0, 100.1, -1])
def test_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(QuantizationError, match=r"percentile.*\(50, 100\]"):
        Percentile(percentile)


SHAPES = {
    "normal": lambda: torch.randn(10_000),
    "heavy tails": lambda: torch.randn(10_000) ** 3,
    "after relu": lambda: torch.randn(10_000).relu() ** 2,
    "negative only": lambda: -(torch.randn(10_000).abs() ** 3),
    "lopsided": lambda: torch.cat([torch.randn(10_000) * 0.1, torch.rand(60) * 8]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [256, 16])
def test_mse_is_as_good_as_a_search_over_all_ranges(shape: str, levels: int) -> None:
    data = SHAPES[shape]()
    raw = data.numpy()
    low, high = min(raw.min(), 0), max(raw.max(), 0)
    grid = np.linspace(0.02, 1, 50)
    lows, highs = (grid * low if low else [0.0]), (grid * high if high else [0.0])
    best = min(rounding_error(raw, a, b, levels) for a, b in itertools.product(lows, highs))
    found = rounding_error(raw, *ends(seen_by(MeanSquaredError(Grid(0, levels - 1, torch.uint8)), [data])), levels)
    assert found <= 1.05 * best
    if (shape, levels) == ("heavy tails", 16):
        assert found < 0.8 * rounding_error(raw, *ends(seen_by(MinMax(), [data])), levels)


@pytest.mark.parametrize("number", [50, 200, 1000, 5000])
def test_few_values_leave_room_for_those_to_come(number: int) -> None:
    """The range of few normal values reaches about as far as the largest of ten thousand, and zero stays its end."""
    highs = []
    for seed in range(20):
        torch.manual_seed(seed)
        values = torch.randn(number)
        low, high = ends(seen_by(MeanSquaredError(), [values]))
        assert low < values.min() * 0.99 or number == 5000
        highs.append(high)
        assert ends(seen_by(MeanSquaredError(), [values.relu()]))[0] == 0
    assert 3.4 < sum(highs) / 20 < 4.2


def test_mse_counts_the_levels_of_the_recipe() -> None:
    """Fewer levels make clipping worth more: the range for 4 bits is narrower than that for 8."""
    recipe = Recipe(name="int4_activations", activation=IntegerSpec(bits=4))
    data = [torch.randn(20_000)]
    narrow, wide = seen_by(build("mse", recipe), data), seen_by(build("mse", Recipe()), data)
    assert ends(narrow)[1] < 0.85 * ends(wide)[1]


# --- streaming


@pytest.mark.parametrize("name", ["min_max", "percentile", "mse"])
def test_streaming_equals_one_pass(name: str) -> None:
    data = batches()
    streamed = seen_by(build(name, Recipe(percentile=99)), data)
    at_once = seen_by(build(name, Recipe(percentile=99)), [torch.cat(data)])
    width = 0.0
    if isinstance(streamed, Histogram):
        assert streamed.counts.sum() == at_once.counts.sum() == sum(batch.numel() for batch in data)
        # The streamed span is at most twice as wide on either side as the data.
        width = 4 * (at_once.span_high - at_once.span_low).item() / at_once.NUM_BINS
        if name == "mse":
            # The optimum is flat: ranges are as good as each other.
            raw = torch.cat(data).numpy()
            assert rounding_error(raw, *ends(streamed)) == pytest.approx(rounding_error(raw, *ends(at_once)), rel=0.02)
            return
    assert ends(streamed) == pytest.approx(ends(at_once), abs=width)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.floats(-1e8, 1e8, width=32), min_size=1, max_size=5).filter(lambda batch: len(set(batch)) > 1),
        min_size=1,
        max_size=6,
    )
)
def test_no_count_is_lost_when_the_span_doubles(values: list[list[float]]) -> None:
    observer = Histogram()
    number = 0
    for batch in values:
        observer.update(torch.tensor(batch))
        number += len(batch)
        assert observer.counts.sum().item() == number
    everything = np.array([value for batch in values for value in batch], dtype=np.float32)
    assert observer.span_low <= everything.min()
    assert observer.span_high >= everything.max()


def test_doubling_keeps_every_count_in_the_bin_of_its_value() -> None:
    data = batches()
    observer = seen_by(Histogram(), data)
    everything = torch.cat(data).double().numpy().ravel()
    edges = np.linspace(observer.span_low.item(), observer.span_high.item(), observer.NUM_BINS + 1)
    expected, _ = np.histogram(everything, edges)
    # A value on an edge may be counted on either side, which float32 decides.
    assert np.abs(np.cumsum(expected) - observer.counts.cumsum(0).numpy()).max() <= 2


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-20, 1e30])
@pytest.mark.parametrize("name", ["percentile", "mse"])
def test_a_first_batch_of_one_value_does_not_stop_the_others(name: str, value: float) -> None:
    data = [torch.full((8,), value), torch.randn(1000)]
    observer = seen_by(build(name, Recipe(percentile=100)), data)
    assert observer.counts.sum() == 1008
    low, high = ends(observer)
    assert high >= 1
    assert low <= -1 or value > 1e29


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow(name: str) -> None:
    observer = build(name, Recipe())

    def memory() -> int:
        return sum(value.numel() * value.element_size() for value in vars(observer).values() if torch.is_tensor(value))

    observer.update(torch.randn(10))
    first = memory()
    for _ in range(30):
        observer.update(torch.randn(5000) * 10)
    assert memory() == first < 64 * 1024


# --- what every observer must do


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_checkpoint(name: str) -> None:
    data = batches()
    whole = seen_by(build(name, Recipe()), data)
    first = seen_by(build(name, Recipe()), data[:2])
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    resumed = build(name, Recipe())
    resumed.load_state(torch.load(file, weights_only=True))
    assert ends(resumed) == ends(first)
    assert ends(seen_by(resumed, data[2:])) == ends(whole)
    # Nothing is shared with the observer that wrote the state.
    assert ends(first) != ends(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_no_view_of_its_observer(name: str) -> None:
    """A state may be applied more than once, and later than the observer that wrote it has moved on."""
    data = batches()
    observer = seen_by(build(name, Recipe()), data[:2])
    state = observer.state()
    written = {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
    other = build(name, Recipe())
    for busy in (observer, other, other):
        busy.load_state(state)
        # The first batch falls inside the span, the last ones widen it.
        seen_by(busy, [data[0], *data[2:]])
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(written[key])) for key in written)
    seen_by(observer, [data[0]])
    fresh = observer.state()
    total = {key: torch.as_tensor(value).clone() for key, value in fresh.items()}
    seen_by(observer, [data[0]])
    assert all(torch.equal(torch.as_tensor(fresh[key]), total[key]) for key in total)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_tensor_changes_nothing_and_no_tensor_raises(name: str) -> None:
    observer = build(name, Recipe())
    observer.update(torch.empty(0, 3))
    with pytest.raises(CalibrationError, match="nothing was observed"):
        observer.range()
    seen_by(observer, batches())
    before = ends(observer)
    observer.update(torch.empty(0, 3))
    assert ends(observer) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_observed_as_float32(name: str, dtype: torch.dtype) -> None:
    data = [torch.randn(500).to(dtype) for _ in range(3)]
    assert ends(seen_by(build(name, Recipe()), data)) == ends(
        seen_by(build(name, Recipe()), [batch.float() for batch in data])
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_raise_while_calibrating(name: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    good, bad = torch.randn(8, 4), torch.randn(8, 4)
    bad[3, 1] = value
    prepared = prepare(model, (good,), observer=name)
    calibrate(prepared, steps_of(prepared, [good]))
    prepared = prepare(model, (good,), observer=name)
    with pytest.raises(CalibrationError, match="Expected finite values at :input"):
        calibrate(prepared, steps_of(prepared, [good, bad, good]))


@pytest.mark.parametrize("name", NAMES)
def test_observing_keeps_no_history_of_the_training_step(name: str) -> None:
    observer = build(name, Recipe())
    observer.update(torch.randn(20, requires_grad=True) * 2)
    assert not any(value.requires_grad for value in vars(observer).values() if torch.is_tensor(value))


def test_unknown_observer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(QuantizationError, match=r"min_max.*moving_average.*mse.*percentile|'entropy'"):
        build("entropy", Recipe())
