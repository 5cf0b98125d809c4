"""What a search is refused for before anything is tried: metrics that there are not, directions, unreachable sizes."""

from collections.abc import Mapping

from lightning_quant.errors import QuantizationError
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.report.limit_names import other_directions
from lightning_quant.report.limits import Limits, unlogged
from lightning_quant.report.make_report import tensor_bytes
from lightning_quant.search.objective import COSTS

# Share by which the file that is written at the end may be smaller than the trial with the captured call's ranges.
_TOLERANCE = 0.02


def check_metrics(
    limits: Limits, objective: str | None, logged: Mapping[str, float], directions: Mapping[str, bool]
) -> None:
    """Refuse limits and an objective on metrics that are not there, or that get worse in another direction.

    Args:
        limits: of the search.
        objective: likewise.
        logged: what a validation has logged.
        directions: metric to whether it is better when higher, where that is known.
    """
    wanted = Limits({objective: 0.0}) if objective not in (None, *COSTS) else Limits()
    if unknown := unlogged(limits, logged) or unlogged(wanted, logged).replace("`limits` are", "`objective` is"):
        raise QuantizationError(f"Expected metrics that validation logs, but {unknown}.")
    said = dict.fromkeys(limits.higher_is_better, True) | dict.fromkeys(limits.lower_is_better, False)
    if wrong := other_directions(directions, said):
        raise QuantizationError(f"Expected limits in the worse direction of each metric, but {wrong[0]}.")
    known = {**directions, **said}
    if unsaid := [name for name in (*limits.max_drop, *wanted.max_drop) if known.get(name) is None]:
        raise QuantizationError(
            f"Expected to know whether {unsaid[0]} is better when it is higher, but neither the metric nor a callback "
            f"that watches it says so. Write the change that `limits` allow with its sign: -0.01 to let it fall, 0.01 "
            "to let it rise."
        )


def check_size(limits: Limits, model: PlannedModel, reached: int) -> None:
    """Refuse a search for a file smaller than the whole recipe makes, which only grows with what is kept in float.

    Args:
        limits: of the search.
        model: whose float tensors count.
        reached: bytes of the file that the whole recipe was tried with.
    """
    whole = tensor_bytes(model.root)
    allowed = [limit for limit in (limits.max_size_bytes,) if limit is not None]
    if limits.max_size_ratio is not None:
        allowed.append(limits.max_size_ratio * whole)
    if allowed and reached * (1 - _TOLERANCE) > min(allowed):
        raise QuantizationError(
            f"Expected `limits` on size that recipe {model.recipe.name!r} can keep, but its smallest file has "
            f"{reached:,} bytes, {reached / whole:.3f} of float's {whole:,}, and {min(allowed):,.0f} are allowed. "
            "Allow more, or take a recipe of fewer bits."
        )
