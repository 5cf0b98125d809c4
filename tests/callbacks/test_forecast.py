import math

import pytest

from lightning_quant.callbacks.forecast import forecast


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([0.1, -0.01], "are kept by the simulation after 2 validations"),
        ([0.1, 0.09], "3 validations are needed for a forecast"),
        ([0.4, 0.3, 0.2, 0.1], "kept after 1 to 1 more validations"),
        ([math.inf, 0.1, 0.1, 0.1], "no validation tells"),
        ([0.1, 0.11, 0.12], "no end is in sight"),
        ([0.4, 0.1, 0.35, 0.2, 0.3], "no end in sight"),
    ],
)
def test_when_a_limit_will_be_kept(gaps: list[float], said: str) -> None:
    assert said in forecast(gaps)


def test_the_more_validations_scatter_the_wider_the_forecast() -> None:
    straight, scattered = (forecast([0.5, 0.4 + s, 0.3 - s, 0.2 + s, 0.1]) for s in (0.0, 0.06))
    widths = []
    for text in (straight, scattered):
        soonest, latest = text.rpartition("after ")[2].split(" more")[0].split(" to ")
        widths.append(int(latest) - int(soonest))
    assert widths[0] < widths[1]
