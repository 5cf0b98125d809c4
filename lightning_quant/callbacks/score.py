"""One validation in training, scored: what the integer twin of the present weights gets on the same batches."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from lightning_quant.callbacks.kept_batches import KeptBatches
from lightning_quant.callbacks.twin import place_twin, runs_on
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.errors import EvaluationError, QuantizationError
from lightning_quant.measure.beside import Beside
from lightning_quant.measure.evaluate_shares import Share, merged
from lightning_quant.measure.logged_values import logged_in, share_of
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import Route

if TYPE_CHECKING:
    from lightning_quant.callbacks.base import QuantizationCallback

FLOAT, TWIN, OWN = "float", "twin", "own"
# By default one batch of so many is scored: run with float weights and in integers, and with the ranges that are
# learned before, it took 0.1 to 0.4 of a validation of 64 batches.
EVERY = 24


class Score:
    """What float weights and their integer twin get in one validation; what it computes itself is not run again.

    Args:
        callback: whose module, plan and settings are meant.
        trainer: at the first batch of a validation.
        pl_module: that is trained.
        sample: batches to learn ranges from, where training has not learned them.
    """

    def __init__(
        self, callback: "QuantizationCallback", trainer: Trainer, pl_module: LightningModule, sample: KeptBatches
    ) -> None:
        self._group, self._path, self._limit = callback.group, callback.path, callback.settings.score_batches
        # Which weights validation itself runs, where it is known, and whether on all that is scored.
        self._own = _own(callback, pl_module)
        self._is_whole = all(number_scored(total, self._limit) >= total for total in trainer.num_val_batches)
        self._without_loss = callback.loss_inputs is not None and callback.loss_inputs.formula is None
        self._stack = ExitStack()
        self._error: QuantizationError | None = None
        self._runs: dict[str, Beside] = {}
        try:
            callback.group.together(self._begin, callback, trainer, pl_module, sample)
        except QuantizationError:
            self.close()
            raise

    def run(self, trainer: Trainer, batch: Any, index: int, loader: int) -> None:
        """Run what is to be run on a batch of validation, before validation itself does."""
        if self._error is not None or not is_scored(index, trainer.num_val_batches[loader], self._limit):
            return
        try:
            for beside in self._runs.values():
                beside.run(batch, index, loader)
        # The user's own step, on a model that it was not written for: told at the end, where all processes meet.
        except Exception as error:
            self._error = _told(error)

    def end(self, trainer: Trainer) -> tuple[dict[str, float], dict[str, float]]:
        """Return the metrics of the twin, and how far they are from those of float weights, of all processes.

        The difference is of the batches that are scored. So are the metrics, unless validation itself runs the twin.

        Raises:
            EvaluationError: validation never called the module.
            QuantizationError: the twin does not take what validation calls it with.
        """
        beside = self._group.together(self._ended)
        logged = {n: share_of(item) for n, item in logged_in(trainer).items() if not n.startswith("quant/")}
        own = {name: share for name, share in logged.items() if share is not None}
        by_weights: dict[str, dict[str, Share]] = {OWN: own, **beside}
        values = {which: merged(self._group.gather(shares)) for which, shares in by_weights.items()}
        twin, floats = (values.get(which, values[OWN]) for which in (TWIN, FLOAT))
        if self._without_loss:
            twin = {name: value for name, value in twin.items() if not math.isnan(value)}
        delta = {name: value - floats.get(name, math.nan) for name, value in twin.items()}
        whole = values[OWN] if self._own == TWIN else {}
        return {name: whole.get(name, value) for name, value in twin.items()}, delta

    def close(self) -> None:
        """Take the twin away."""
        self._stack.close()

    def _begin(self, callback: "QuantizationCallback", *args: Any) -> None:
        """Make the twin; of copies and steps of users' modules any error may come, and parametrizations may draw."""
        try:
            with isolated_rng():
                self._make(callback, *args)
        except Exception as error:
            raise _told(error) from error

    def _make(
        self, callback: "QuantizationCallback", trainer: Trainer, pl_module: LightningModule, sample: KeptBatches
    ) -> None:
        for which in (FLOAT, TWIN):
            if not self._is_whole or which != self._own:
                device = runs_on(callback, trainer) if which == TWIN else trainer.strategy.root_device
                beside = self._runs[which] = Beside(trainer, pl_module, callback.path, device)
                # As the run's own validation has them, where several processes see data of their own.
                callback.group.share_tensors(beside.pl_module)
        if TWIN in self._runs:
            place_twin(callback, trainer, pl_module, self._runs[TWIN], sample, self._stack)

    def _ended(self) -> dict[str, dict[str, Share]]:
        """Return what was logged beside the run, by weights."""
        if self._error is not None:
            raise self._error
        if any(beside.num_calls == 0 for beside in self._runs.values()):
            name = repr(self._path) if self._path else "its own forward"
            raise EvaluationError(f"Expected `validation_step` to call {name}, but it never did.")
        try:
            return {which: beside.end() for which, beside in self._runs.items()}
        except Exception as error:
            raise _told(error) from error


def number_scored(total: float, limit: int | float | None) -> float:
    """Return how many of a loader's batches are scored.

    Args:
        total: how many it has; infinite where nobody knows, and the least number is returned for a share.
        limit: a number, or a share of them; None for the default share.
    """
    if isinstance(limit, int):
        return min(limit, total)
    share = 1 / EVERY if limit is None else limit
    if share == 1:
        return total
    return max(1, int(total * share)) if math.isfinite(total) else 1


def is_scored(index: int, total: float, limit: int | float | None) -> bool:
    """Tell whether a batch is scored: they lie evenly, since data may be in the order of their classes.

    Args:
        index: of the batch, from 0.
        total: how many the loader has; where nobody knows, a limit takes the first.
        limit: as in `number_scored`.
    """
    if not math.isfinite(total) and limit is None:
        return index % EVERY == 0
    number = number_scored(total, limit)
    return index < number if not math.isfinite(total) else number >= total or index * number % total < number


def _told(error: Exception) -> QuantizationError:
    """Return an error of validation beside the run as one that processes tell each other."""
    return error if isinstance(error, QuantizationError) else EvaluationError(f"validation beside the run: {error!r}")


def _own(callback: "QuantizationCallback", pl_module: LightningModule) -> str:
    """Return which of both weights validation itself runs; empty where it is neither."""
    model, settings = callback.require_prepared(), callback.settings
    if not model.rounds_now:
        # Another callback may train through rounding.
        return "" if any(isinstance(c.__dict__.get("forward"), Route) for c in pl_module.modules()) else FLOAT
    prepared = Prepared.of(model)
    # Layers that are stored small beside the graph stand in the artifact alone, and so do the recipe's bits at first.
    differs = bool(prepared.left) or prepared.ranges.more_bits > 0
    return TWIN if settings.score_with == "simulation" and not differs else ""


def log_no_score(trainer: Trainer, pl_module: LightningModule, begins: str, watching: list[str]) -> None:
    """Log that there is no score, where one was logged before or is watched: an earlier one would be taken for it.

    Args:
        trainer: at the end of a validation's epoch; what stops a run early decides nothing by such a score any more.
        pl_module: that logs it.
        begins: what the keys of scores begin with.
        watching: keys that something watches.
    """
    known = [name for name in trainer.callback_metrics if name.startswith(begins)]
    for name in sorted({*watching, *known}):
        _log(pl_module, name, math.nan)
    for watcher in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(watcher, "monitor", None) in watching and hasattr(watcher, "check_finite"):
            # Its patience and the like are in checkpoints, and stay what they are.
            watcher._should_skip_check = _always


def log_score(
    trainer: Trainer, pl_module: LightningModule, prefix: str, twin: dict[str, float], delta: dict[str, float]
) -> None:
    """Log what a twin gets, and how far that is from float, beside what validation logged and where that is shown.

    Args:
        trainer: at the end of a validation's epoch, when Lightning takes what is logged.
        pl_module: that logs it.
        prefix: what keys begin with.
        twin: metrics of the twin.
        delta: how far each is from that of float weights.
    """
    records = logged_in(trainer)
    for name, value in twin.items():
        meta = records[name].meta if name in records else None
        shown = bool(trainer.loggers) and (meta is None or meta.logger)
        on_bar = meta is not None and meta.prog_bar
        _log(pl_module, f"{prefix}/twin/{name}", value, prog_bar=on_bar, logger=shown)
        _log(pl_module, f"{prefix}/twin_delta/{name}", delta[name], logger=shown)
        if meta is not None and meta.forked:
            # What is logged for steps as well has two names.
            plain = name.replace(meta.forked_name(False), meta.name, 1)
            _log(pl_module, f"{prefix}/twin/{plain}", value)
            _log(pl_module, f"{prefix}/twin_delta/{plain}", delta[name])


def _log(pl_module: LightningModule, key: str, value: float, *, prog_bar: bool = False, logger: bool = False) -> None:
    # Every process has the same value; the greatest of them is that one to the bit.
    how: dict[str, Any] = {"sync_dist": True, "reduce_fx": "max", "add_dataloader_idx": False, "batch_size": 1}
    pl_module.log(key, value, prog_bar=prog_bar, logger=logger, on_step=False, on_epoch=True, **how)


def _nothing() -> None: ...


class AfterHook:
    """Runs something right behind a hook of a LightningModule, once, and stands in its way no longer.

    Callbacks' hooks run before the module's own of the same name, which may log what is to be compared.
    """

    def __init__(self, pl_module: LightningModule, hook: str, then: Callable[[], None]) -> None:
        self._pl_module, self._hook, self._then = pl_module, hook, then
        self._before = pl_module.__dict__.get(hook)
        pl_module.__dict__[hook] = self

    def __call__(self, *args: Any) -> Any:
        """Run the hook, and then what is to be run behind it."""
        self.remove()
        result = getattr(self._pl_module, self._hook)(*args)
        self._then()
        return result

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the module, an average's say, run their hook alone.
        return {**self.__dict__, "_then": _nothing}

    def remove(self) -> None:
        """Give the module its own hook back; safe to call twice."""
        if self._pl_module.__dict__.get(self._hook) is self:
            del self._pl_module.__dict__[self._hook]
            if self._before is not None:
                self._pl_module.__dict__[self._hook] = self._before


def _always(trainer: Trainer) -> bool:
    return True
