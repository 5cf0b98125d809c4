"""When training through rounding will have reached a limit, and how sure that is."""

import math

from lightning_quant.measure.contributions import student_quantile

# Validations under rounding that a forecast needs at least.
_LEAST = 3
# What decimals leave of a whole number.
_ROUNDING = 1e-6


def forecast(gaps: list[float]) -> str:
    """Return in words when a limit will be kept, by a line through what validations missed it by, with its interval.

    Args:
        gaps: what is missing after each validation under rounding, the oldest first; zero or less is kept.

    Source: the confidence interval of a line's zero by its slope's standard error, Draper and Smith, "Applied
    Regression Analysis" (1998), section 3.2, with the intercept taken as known.
    """
    if not all(map(math.isfinite, gaps)):
        return "no validation tells how far the limits are missed"
    if gaps[-1] <= 0:
        return f"the limits are kept by the simulation after {len(gaps)} validations under rounding"
    if len(gaps) < _LEAST:
        return f"the limits are missed by {gaps[-1]:.4g}, and {_LEAST} validations are needed for a forecast"
    number = len(gaps)
    middle, mean = (number - 1) / 2, sum(gaps) / number
    spread = sum((index - middle) ** 2 for index in range(number))
    slope = sum((index - middle) * (gap - mean) for index, gap in enumerate(gaps)) / spread
    rest = sum((gap - mean - slope * (index - middle)) ** 2 for index, gap in enumerate(gaps))
    error = student_quantile(0.95, number - 2) * math.sqrt(rest / (number - 2) / spread)
    quick, slow = slope - error, slope + error
    if quick >= 0:
        return f"the limits are missed by {gaps[-1]:.4g}, and nothing is gained: no end is in sight"
    soonest = math.ceil(gaps[-1] / -quick - _ROUNDING)
    latest = f"{math.ceil(gaps[-1] / -slow - _ROUNDING)}" if slow < 0 else "no end in sight"
    return f"the limits are missed by {gaps[-1]:.4g}; they are kept after {soonest} to {latest} more validations"
