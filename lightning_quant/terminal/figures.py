"""Numbers as a reader takes them in: three significant digits where three tell, powers of ten where no others do."""

import math

# Decimals of a metric where nothing is gained by more, and the most that a column has room for.
_USUAL, _MOST = 4, 9


def figures(value: float | str | None) -> str:
    """Return a number with three significant digits, or a dash for none; infinities are texts already."""
    if value is None or isinstance(value, str):
        return value or "-"
    if 1000 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}" if value else "0"


def fixed(value: float | None, *beside: float | None, sign: bool = False) -> str:
    """Return a number with four decimals, or with as many as three digits of the largest of its row need.

    Args:
        value: None is a dash.
        beside: what it is read beside: a change of a metric has the decimals of the metric.
        sign: whether to write a plus.
    """
    if value is None:
        return "-"
    largest = max((abs(x) for x in (value, *beside) if x is not None and math.isfinite(x)), default=0.0)
    decimals = _USUAL if largest == 0 else max(_USUAL, 2 - math.floor(math.log10(largest)))
    if decimals > _MOST:
        return f"{value:+.2e}" if sign else f"{value:.2e}"
    return f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
