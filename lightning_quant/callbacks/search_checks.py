"""What a search of a callback is refused for before training: by what a little of validation logs."""

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from lightning_quant.callbacks.directions import watched
from lightning_quant.callbacks.training_data import borrowed_loaders
from lightning_quant.errors import QuantizationError
from lightning_quant.measure.contributions import Metrics
from lightning_quant.measure.evaluate import evaluate, why_no_metrics
from lightning_quant.search.checks import check_metrics
from lightning_quant.search.objective import COSTS

if TYPE_CHECKING:
    from lightning_quant.callbacks.base import QuantizationCallback

# As many as Lightning itself tries before training.
_NUM_BATCHES = 2


def check_searchable(callback: "QuantizationCallback", trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a search whose limits no validation tells of, by what two batches of it log.

    Raises:
        QuantizationError: there is no validation, a metric is not logged, or the limits have another direction.
    """
    settings = callback.settings
    on_metrics = settings.limits.on_metrics or settings.objective not in COSTS
    if not settings.searches or not on_metrics:
        return
    with borrowed_loaders(trainer):
        logged = first_metrics(callback, trainer, pl_module, "limits")
    directions = watched(trainer, callback._checkpoint) | logged.higher_is_better
    check_metrics(settings.limits, settings.objective, logged, directions)


def first_metrics(
    callback: "QuantizationCallback", trainer: Trainer, pl_module: LightningModule, argument: str
) -> Metrics:
    """Return what two batches of validation log.

    Raises:
        QuantizationError: they log nothing.
    """
    logged = evaluate(trainer, pl_module, callback.path, limit_batches=_NUM_BATCHES, group=callback.group)
    if not logged:
        raise QuantizationError(
            f"Expected `{argument}` on metrics only where validation logs them, but {why_no_metrics(trainer)}."
        )
    return logged
