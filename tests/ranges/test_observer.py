"""What every observer keeps, and observers of extremes that are updated side by side."""

import pytest
import torch

from lightning_quant.errors import CalibrationError
from lightning_quant.ranges.observer import Extremes, MinMax, MovingAverage


def test_nothing_seen_is_no_range_and_a_state_is_one_that_another_takes_over() -> None:
    observer = MinMax()
    observer.update(torch.empty(0))
    with pytest.raises(CalibrationError, match="nothing was observed"):
        observer.range()
    observer.update(torch.tensor([[1.0, -3.0], [2.0, 0.5]]).half())
    other = MinMax()
    other.load_state(observer.state())
    other.update(torch.tensor([7.0]))

    assert observer.range() == (-3.0, 2.0)
    assert other.range() == (-3.0, 7.0)
    assert (observer.num_updates, other.num_updates) == (1, 2)
    assert observer.low is not None
    assert observer.low.dtype == torch.float32


@pytest.mark.parametrize("kind", [MinMax, MovingAverage])
def test_observers_side_by_side_are_those_alone(kind: type[Extremes]) -> None:
    together, alone = [kind() for _ in range(3)], [kind() for _ in range(3)]
    ends = None
    for seed in range(5):
        values = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        low, high = values.aminmax(dim=1)
        ends = kind.update_all(together, low, high, ends)
        for observer, row in zip(alone, values, strict=True):
            observer.update(row)
        assert ends.are_of(together)
        assert not ends.are_of(alone)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.range(), other.range())
        assert one.num_updates == other.num_updates == 5


def test_ends_that_somebody_moved_are_not_taken_for_those_of_the_observers() -> None:
    observers = [MinMax(), MinMax()]
    ends = MinMax.update_all(observers, torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]))
    observers[0].update(torch.tensor([5.0]))
    MinMax.update_all(observers, torch.zeros(2), torch.zeros(2), ends)
    assert observers[0].range() == (-1.0, 5.0)
