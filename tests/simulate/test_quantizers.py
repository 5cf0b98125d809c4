"""State of quantizers lies outside the module, and follows the phases."""

import io

import pytest
import torch
from models import DropPathNet, ResidualNet, with_statistics
from residual_nets import IMAGE, UNCORRECTED, residual_net

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.simulate.quantizers import PHASES


def test_an_unknown_phase_is_refused_with_the_known_ones() -> None:
    _, prepared = residual_net()
    with pytest.raises(QuantizationError, match="frozen_batch_norm"):
        prepared.set_phase("training")


def test_ranges_move_only_while_observing_in_a_phase_that_observes() -> None:
    model, prepared = residual_net()

    def ranges() -> list[tuple[float, float]]:
        return [tuple(map(float, observer.range())) for observer in prepared.ranges.observers.values()]

    start = ranges()
    with torch.no_grad():
        for phase in PHASES:
            with prepared.attached(phase, observing=False):
                model(10 * IMAGE)
            assert ranges() == start, phase
        for phase in ("off", "frozen", "frozen_batch_norm"):
            with prepared.attached(phase, observing=True):
                model(10 * IMAGE)
            assert ranges() == start, phase
        for factor, phase in ((10, "observe"), (100, "fake_quantize")):
            before = ranges()
            with prepared.attached(phase, observing=True):
                model(factor * IMAGE)
            assert all(new != old for new, old in zip(ranges(), before, strict=True)), phase


@pytest.mark.parametrize("observed", [False, True])
def test_eight_bits_beside_learned_ranges_follow_the_data(observed: bool) -> None:
    model = with_statistics(ResidualNet()).train()
    prepared = prepare(model, (IMAGE,), observer="moving_average", recipe="int4")
    prepared.begin_learning()
    for phase in (*["observe"] * observed, "fake_quantize"):
        with prepared.attached(phase, observing=True):
            model(IMAGE)
    assert prepared.learned_steps is not None
    edges = prepared.ranges.edges
    learned = {i for i, edge in edges.items() if f"edges {edge.shared}" in prepared.learned_steps.logarithms}
    assert learned
    assert learned == set(edges) - prepared.ranges.wide


@pytest.mark.parametrize("corrected", [False, True])
def test_state_survives_a_checkpoint(corrected: bool) -> None:
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,), observer="min_max", recipe="int8" if corrected else UNCORRECTED)
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    prepared.set_phase("frozen")
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = prepare(model, (IMAGE,), observer="min_max")
    other.load_state_dict(state)
    other.load_state_dict(state)
    assert other.phase == "frozen"
    with torch.no_grad():
        with prepared.attached("frozen"):
            expected = model(IMAGE)
        with other.attached("frozen"):
            assert torch.equal(model(IMAGE), expected)


def test_state_of_another_model_is_refused() -> None:
    _, prepared = residual_net()
    other = prepare(with_statistics(DropPathNet()).eval(), (IMAGE,))
    with pytest.raises(QuantizationError, match="Expected quantizer state of this model"):
        other.load_state_dict(prepared.state_dict())
