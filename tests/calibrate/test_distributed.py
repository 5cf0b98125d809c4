"""What several processes agree on; one process meets nobody."""

import pytest
import torch
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.distributed import Group, calibrate_together, merge_batch
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.export.prepare import prepare

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def refuse() -> None:
    raise CalibrationError("no")


def test_one_process_is_the_first_and_gets_its_own_values() -> None:
    group, tensor = Group(), torch.randn(3)

    assert group.is_first
    assert group.gather(5) == [5]
    assert group.share(tensor) is tensor
    assert group.on_first(lambda x: x + 1, 2) == 3
    assert all(torch.equal(reduced, tensor) for reduced in (group.maximum(tensor), group.total(tensor)))
    with pytest.raises(QuantizationError, match="no"):
        group.together(refuse)


@pytest.mark.parametrize("observer", ["min_max", "mse"])
def test_ranges_of_one_process_are_those_of_calibrating_alone(observer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    alone, together = (prepare(model, (X[:8],), observer=observer) for _ in range(2))
    calibrate(alone, steps_of(alone, X.split(8)))
    calibrate_together(Group(), together, lambda: steps_of(together, X.split(8)))

    for identity in alone.ranges.edges:
        torch.testing.assert_close(
            together.ranges.parameters(identity), alone.ranges.parameters(identity), rtol=0.02, atol=0.5
        )


def test_a_batch_counts_once_and_what_is_no_number_is_not_lost() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    prepared = prepare(model, (X,), observer="min_max")
    prepared.ranges.waits = True
    with torch.no_grad(), prepared.attached("observe", observing=True):
        model(X)
        assert prepared.ranges.has_seen
        merge_batch(Group(), prepared.ranges)
    assert prepared.ranges.observers[":input"].range() == (X.min(), X.max())

    with torch.no_grad(), prepared.attached("observe", observing=True):
        model(X.index_fill(0, torch.tensor([3]), torch.nan))
    merge_batch(Group(), prepared.ranges)
    with pytest.raises(CalibrationError, match="finite"):
        prepared.ranges.check()
