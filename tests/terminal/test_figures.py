import pytest

from lightning_quant.terminal.figures import figures, fixed


def test_three_digits_without_powers_of_ten() -> None:
    shown = [figures(value) for value in (1234.5, 0.000123456, 0.0, None, "inf")]
    assert shown == ["1,230", "0.000123", "0", "-", "inf"]


@pytest.mark.parametrize(
    ("value", "beside", "sign", "expected"),
    [
        (0.8123, (0.8,), False, "0.8123"),
        (-0.0011, (1.0072,), True, "-0.0011"),
        # An error of squares of small numbers has a change that four decimals hide.
        (3.12e-5, (), False, "0.0000312"),
        (-4.1e-7, (3.125e-5,), True, "-0.0000004"),
        (2.5e-12, (), False, "2.50e-12"),
        (12345.678, (), False, "12345.6780"),
        (0.0, (), True, "+0.0000"),
        (float("nan"), (0.5,), True, "+nan"),
        (float("inf"), (None,), False, "inf"),
        (None, (0.5,), False, "-"),
    ],
)
def test_a_metric_has_as_many_decimals_as_tell(
    value: float | None, beside: tuple[float | None, ...], sign: bool, expected: str
) -> None:
    assert fixed(value, *beside, sign=sign) == expected
