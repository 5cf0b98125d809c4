"""What both callbacks do while a fit validates: score the integer twin, and look at what is logged."""

import collections
import functools
import inspect
import math
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_quant.callbacks.announce import warn
from lightning_quant.callbacks.directions import watched
from lightning_quant.callbacks.kept_batches import KeptBatches
from lightning_quant.callbacks.score import AfterHook, Score, log_no_score, log_score, number_scored
from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.errors import QuantizationError
from lightning_quant.report.limits import unlogged

if TYPE_CHECKING:
    from lightning_quant.callbacks.base import QuantizationCallback

# Batches at most that ranges are learned from for each score where training does not learn them.
_MOST_KEPT = 4


class ScoredValidation(Callback):
    """Base of the callbacks: hooks of validation."""

    def __init__(self) -> None:
        super().__init__()
        # Whether a validation was looked at.
        self._validated = False
        # How many validations there were, those before the run was resumed among them.
        self._num_validations = 0
        self._sample = KeptBatches()
        # Whether the validation that runs is to be scored, its score, and what ends it.
        self._is_due = False
        self._score: Score | None = None
        self._after: AfterHook | None = None
        # Why nothing is scored any more.
        self._unscored = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sample": KeptBatches(), "_score": None, "_after": None}

    @property
    def settings(self) -> CallbackSettings:
        """What the callback was given."""
        raise NotImplementedError

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins: see whether it is to be scored."""
        every = self.settings.score_every
        counts = every is not None and trainer.state.fn == "fit" and not trainer.sanity_checking
        due = counts and (self._num_validations % (every or 1) == 0 or bool(_monitors(self, trainer)))
        self._is_due = due and not self._unscored
        self._num_validations += counts

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a batch of validation: run the twin on a copy of it."""
        if not self._is_due:
            return
        if self._score is None:
            # At the first batch: weights that are swapped for validation, averages say, are in place by now.
            self._score = self._tried(Score, cast("QuantizationCallback", self), trainer, pl_module, self._sample)
        if self._score is not None:
            self._score.run(trainer, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when all batches are through: log the score behind what the module itself logs now."""
        if self._score is not None:
            end = functools.partial(self._end_score, trainer, pl_module, self._score)
            self._after = AfterHook(pl_module, "on_validation_epoch_end", end)
        elif self._unscored and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log_nothing(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: warn, the first time, of limits on what it does not log."""
        unknown = "" if self._validated else unlogged(self.settings.limits, trainer.callback_metrics)
        self._validated = True
        if unknown:
            warn(f"{type(self).__name__}: {unknown}.")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is saved: keep how many validations there were, where that matters."""
        # Not as a state of its own: callbacks without one may be alike.
        if (self.settings.score_every or 1) > 1:
            state = checkpoint.setdefault("callbacks", {}).setdefault(self.state_key, {})
            state["validations"] = self._num_validations

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_validations = state_dict.get("validations", 0)

    def begin_scores(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep batches to learn ranges from, and refuse what cannot be scored.

        Raises:
            QuantizationError: there is no validation to score, or a callback watches scores that nobody asked for.
        """
        settings, watching = self.settings, _monitors(self, trainer)
        if settings.score_every is None:
            _check_none_wanted(settings, watching)
            return
        self._unscored = ""
        if not trainer.enable_validation:
            raise QuantizationError("Expected a validation loop for `score_every`, but the run has none.")
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        _check_validation(settings, trainer, pl_module)
        self._tell_number(trainer)
        if settings.recipe.needs_calibration:
            chosen = getattr(self, "calibration", None)
            allowed, data, seed = (_MOST_KEPT, "train", 0) if chosen is None else vars(chosen).values()
            # Learning ranges costs several times as much for a batch as validating does.
            number = max(1, int(min(allowed, _MOST_KEPT, sum(trainer.num_val_batches) / 64)))
            self._sample = KeptBatches.of(trainer, pl_module, number, seed, data)

    def _tell_number(self, trainer: Trainer) -> None:
        totals, limit = trainer.num_val_batches, self.settings.score_batches
        number, total = sum(number_scored(n, limit) for n in totals), sum(totals)
        if number < total < math.inf:
            rank_zero_info(
                f"{type(self).__name__}: scores are of {number:g} of {total:g} validation batches; `score_batches=1.0` "
                "takes all."
            )

    def drop_score(self) -> None:
        """Take away what stands in the way of a validation that was cut short; safe to call twice."""
        if self._after is not None:
            self._after.remove()
        if self._score is not None:
            self._score.close()
        self._score = self._after = None

    def _end_score(self, trainer: Trainer, pl_module: LightningModule, score: Score) -> None:
        values = self._tried(score.end, trainer)
        self.drop_score()
        if values is None:
            self._log_nothing(trainer, pl_module)
        else:
            log_score(trainer, pl_module, prefix_of(cast("QuantizationCallback", self), trainer), *values)

    def _log_nothing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begins = f"{prefix_of(cast('QuantizationCallback', self), trainer)}/twin"
        log_no_score(trainer, pl_module, begins, _monitors(self, trainer))

    def _tried(self, function: Any, *args: Any) -> Any:
        """Call a function; where a score fails training goes on, and a warning says why there are none."""
        try:
            return function(*args)
        except QuantizationError as error:
            self._unscored, self._is_due = str(error), False
            told = f"scores while training are missing after {self._num_validations - 1} validations: {error}".rstrip(
                "."
            )
            cast("QuantizationCallback", self).missing.append(told)
            warn(f"{type(self).__name__}: validations are not scored any more: {error}")
            return None


def prefix_of(callback: "QuantizationCallback", trainer: Trainer) -> str:
    """Return what a callback's keys begin with: "quant", and its name where it has one or is not the only one.

    Where nobody named them, several are told apart by recipe and runtime, with the module where those are the same, and
    a number where that is, too.
    """
    if callback.settings.name is not None:
        return f"quant/{callback.settings.name}"
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    every = [c for c in callbacks if isinstance(c, ScoredValidation)]
    if len(every) < 2:
        return "quant"
    unnamed = [cast("QuantizationCallback", c) for c in every if c.settings.name is None]
    names = [f"{c.settings.recipe.name}-{c.settings.runtime}" for c in unnamed]
    counts = collections.Counter(names)
    names = [f"{n}-{c.path}" if counts[n] > 1 and c.path else n for n, c in zip(names, unnamed, strict=True)]
    position = next(i for i, c in enumerate(unnamed) if c is callback)
    before = names[:position].count(names[position])
    return f"quant/{names[position]}" + (f"-{before + 1}" if before else "")


def _monitors(callback: Any, trainer: Trainer) -> list[str]:
    """Return the scores that another callback, or a schedule of learning rates, watches."""
    names = [*watched(trainer), *(config.monitor for config in trainer.lr_scheduler_configs)]
    begin = f"{prefix_of(callback, trainer)}/twin"
    return [name for name in names if isinstance(name, str) and name.startswith((f"{begin}/", f"{begin}_delta/"))]


def _check_none_wanted(settings: CallbackSettings, watching: list[str]) -> None:
    wanted = f"{watching[0]!r}, which a callback or schedule watches" if watching else ""
    wanted = wanted or ("`score_batches`" if settings.score_batches is not None else "")
    wanted = wanted or ("`score_with`" if settings.score_with != "simulation" else "")
    if wanted:
        raise QuantizationError(f"Expected `score_every` for {wanted}, but got None. Pass `score_every=1`.")


def _check_validation(settings: CallbackSettings, trainer: Trainer, pl_module: LightningModule) -> None:
    if "dataloader_iter" in inspect.signature(pl_module.validation_step).parameters:
        raise QuantizationError(
            "Expected `validation_step` to take a batch for `score_every`, but it takes `dataloader_iter`."
        )
    if getattr(trainer, "barebones", False):
        raise QuantizationError("Expected a Trainer that logs for `score_every`, but got `barebones=True`.")
    has_share = isinstance(settings.score_batches, float) and settings.score_batches < 1
    if has_share and not all(map(math.isfinite, trainer.num_val_batches)):
        raise QuantizationError(
            f"Expected `score_batches` to be a number of batches, since a validation loader does not know its length, "
            f"but got the share {settings.score_batches}."
        )
