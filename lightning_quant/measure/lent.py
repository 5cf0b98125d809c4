"""What a step sees of its run while it is tried or measured beside it: there to look at, and out of its reach."""

import dataclasses
import shutil
import weakref
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_quant.capture.capture import StepStoppedError
from lightning_quant.machine.disk import lasting_scratch_folder

# What Lightning, or the user's own code, may ask of callbacks, optimizers and schedulers to do.
_HOOKS = frozenset(n for n in dir(Callback) if not n.startswith("_") and callable(getattr(Callback, n)))
_STEPS = frozenset(("step", "zero_grad", "load_state_dict", "toggle_model", "untoggle_model"))


class LentLogger(DummyLogger):
    """Takes whatever is logged and keeps nothing; its folder is one of its own, which is gone with it."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = ""

    @property
    def save_dir(self) -> str:
        """The folder, for what a step writes beside its logs."""
        if not self._folder:
            self._folder = str(lasting_scratch_folder())
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    log_dir = root_dir = save_dir


def lent_loggers(trainer: Trainer) -> list[LentLogger]:
    """Return as many loggers as a trainer has."""
    return [LentLogger() for _ in trainer.loggers]


class Shown:
    """Stands for an object of the run: of its class, with its attributes, and does nothing that it is asked to."""

    def __new__(cls, subject: Any, *_: Any, **__: Any) -> Any:
        """Make one whose type has the name of the subject's, for code that asks by name."""
        return object.__new__(type(type(subject).__name__, (cls,), {}))

    def __init__(self, subject: Any, still: frozenset[str], **instead: Any) -> None:
        self.__dict__.update(instead, _subject=subject, _still=still)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._subject)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_subject" not in self.__dict__:
            raise AttributeError(name)
        return _do_nothing if name in self._still else getattr(self._subject, name)


def shown_schedulers(trainer: Trainer) -> list[Any]:
    """Return a trainer's learning rate schedulers, as Lightning configures them, to be looked at."""
    configs: Iterable[Any] = trainer.lr_scheduler_configs
    return [dataclasses.replace(config, scheduler=Shown(config.scheduler, _STEPS)) for config in configs]


def lr_schedulers(trainer: Trainer) -> Any:
    """Return what `LightningModule.lr_schedulers` does, to be looked at."""
    schedulers = [config.scheduler for config in shown_schedulers(trainer)]
    return schedulers[0] if len(schedulers) == 1 else schedulers or None


class _InertOptimizer:
    """Stands in for the user's optimizers: the first thing that would change something ends the step."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        if name == "step":
            raise StepStoppedError
        return _do_nothing if name in ("zero_grad", "toggle_model") else getattr(self.optimizer, name)


def inert_optimizers(trainer: Trainer) -> Any:
    """Return what `LightningModule.optimizers` does; the first step of one ends the training step."""
    wrapped = [_InertOptimizer(optimizer) for optimizer in trainer.optimizers]
    return wrapped[0] if len(wrapped) == 1 else wrapped


class Lender(Callback):
    """Lets validation on another Trainer see what it sees in the run: data module, callbacks, metrics, optimizers.

    The data module comes behind its own setup, and goes before its teardown; no hook of a callback runs.
    """

    def __init__(self, lender: Trainer) -> None:
        self.lender: Any = lender

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when validation is set up: lend the data module, which the module's own setup may ask."""
        trainer.datamodule = getattr(self.lender, "datamodule", None)  # type: ignore[attr-defined]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins: lend all the rest."""
        evaluator: Any = trainer
        evaluator._logger_connector._callback_metrics.update(self.lender.callback_metrics)
        evaluator.callbacks = [*evaluator.callbacks, *(Shown(one, _HOOKS) for one in self.lender.callbacks)]
        optimizers = [Shown(one, _STEPS, state={}) for one in self.lender.optimizers]
        evaluator.strategy._optimizers = evaluator.strategy._lightning_optimizers = optimizers
        evaluator.strategy.lr_scheduler_configs = shown_schedulers(self.lender)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends: take the data module back before teardown."""
        trainer.datamodule = None  # type: ignore[attr-defined]


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None
