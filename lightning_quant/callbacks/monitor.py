"""How well a model could be quantized if training stopped now, as scalars and warnings: no quantization needed."""

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_quant.arguments.arguments import check_number, check_positive, patterns
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.callbacks.announce import warn
from lightning_quant.callbacks.refusals import refused_in_callback
from lightning_quant.graph.table import matches
from lightning_quant.measure.quantizability import (
    Numbers,
    clipped_share,
    first_integers,
    input_numbers,
    weight_numbers,
    weight_of,
    worst_of,
)
from lightning_quant.numerics.kurtosis import add_kurtosis_gradient
from lightning_quant.report.monitored import Look, Monitored
from lightning_quant.surgery.compilation import is_compiled

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# Samples of a batch that are looked at, and the weight of a new range.
_SAMPLES, _MOMENTUM = 8, 0.1
# Looks that a figure is drawn of.
_MAX_LOOKS = 200
_WAYS_OUT = (
    "Ways out: weight decay or a lower learning rate, `QuantizationMonitor(regularize=...)`, normalization in front of "
    "it, scales per channel where they are not, or `exclude=[{name!r}]` of what quantizes"
)


@known_arguments
class QuantizationMonitor(Callback):
    """Log how each layer would bear rounding, and warn in the epoch in which one goes bad.

    On every n-th training batch, or the next one that moves weights where gradients accumulate, and at least once an
    epoch, linear layers and convolutions are looked at: what they read, on up to eight samples, and their weights.
    Loggers get "quant/monitor/<layer>/..." of each, of several calls of one layer in a batch those of the worst:

    * `input_db` and `weight_db`: the signal-to-noise ratio that rounding leaves the median channel;
    * `input_spread` and `weight_spread`: how many times as far as the median channel the widest one reaches;
    * `kurtosis` of the weight, and `flips`: the share of its values that one step moves to another integer;
    * `clipped`: the share of what is read outside the range so far, and `drift`: its width over that of the range.

    `trainer.callback_metrics` has those of the worst layer: "quant/worst_db", "quant/worst_spread" and
    "quant/worst_flips". It works in float runs and beside quantization-aware training, which stays what it is. The
    report of an artifact that is made when fit ends has a figure of the worst layers over the epochs.

    Args:
        every_n_steps: batches between two looks. One costs about one and a half steps of a ResNet18, so that 100 is
            1.5 % of a run with epochs of as many batches.
        bits: of the grids.
        alarm_db: of the median channel, below which a layer has gone bad.
        alarm_spread: above which it has.
        regularize: weight of a penalty on weights whose distribution is not flat, `(kurtosis - 1.8)^2`, whose gradient
            is added to that of the loss. Off by default: weights get as flat as it says, but on digits no file of
            three to eight bits was better for it by what could be told (examples/benchmarks/README.md).
        exclude: patterns on names and types of layers that are not looked at.

    Raises:
        MisconfigurationException: an argument is wrong, or there is no layer to look at.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[QuantizationMonitor()], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        bits: int = 8,
        alarm_db: float = 15.0,
        alarm_spread: float = 50.0,
        regularize: float = 0.0,
        exclude: str | list[str] | tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        refused_in_callback(check_positive, "every_n_steps", every_n_steps)
        refused_in_callback(check_number, "bits", bits, 2, 16)
        refused_in_callback(check_number, "alarm_db", alarm_db)
        refused_in_callback(check_number, "alarm_spread", alarm_spread, 1)
        refused_in_callback(check_number, "regularize", regularize)
        self.every_n_steps, self.bits, self.regularize = every_n_steps, int(bits), regularize
        self.alarm_db, self.alarm_spread = alarm_db, alarm_spread
        self.exclude = refused_in_callback(patterns, "exclude", exclude)
        # Layers that have gone bad, by name, and what was wrong then.
        self.bad: dict[str, str] = {}
        # Range of what each layer reads, averaged over looks.
        self._ranges: dict[str, tuple[float, float]] = {}
        self._hooks = ExitStack()
        # What is seen of the batch that is looked at, and of each call of a layer in it; None where none is.
        self._seen: dict[str, dict[str, float]] | None = None
        self._reads: dict[str, list[tuple[Numbers, float]]] = {}
        self._integers: dict[str, Tensor] = {}
        # Whether this epoch was looked at, whether a look is due, and whether a batch has moved weights.
        self._has_looked = self._is_due = self._has_moved = False
        # The epoch of each look, and what each layer's worse side would have kept.
        self.looks: list[tuple[float, dict[str, float]]] = []

    @property
    def monitored(self) -> Monitored | None:
        """What was seen, for a report; None where nothing was."""
        return Monitored(tuple(Look(*look) for look in self.looks)) if self.looks else None

    @override
    def state_dict(self) -> dict[str, Any]:
        ranges = {name: list(ends) for name, ends in self._ranges.items()}
        return {"looks": [[epoch, dict(db)] for epoch, db in self.looks], "ranges": ranges, "bad": dict(self.bad)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.looks = [(epoch, dict(db)) for epoch, db in state_dict.get("looks", [])]
        self._ranges = {name: (low, high) for name, (low, high) in state_dict.get("ranges", {}).items()}
        self.bad = dict(state_dict.get("bad", {}))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before a checkpoint is read: what an earlier fit saw is none of this one."""
        if stage == "fit":
            self.looks, self.bad, self._ranges = [], {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": ExitStack(), "_seen": None, "_reads": {}, "_integers": {}}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit begins: make sure that there is something to look at."""
        if not dict(self._layers(pl_module)):
            raise MisconfigurationException(
                f"Expected layers to look at, but {type(pl_module).__name__} has no linear layer and no convolution "
                f"that `exclude={list(self.exclude)}` leaves."
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when an epoch begins."""
        self._has_looked = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a training batch: look at this one, if it is its turn."""
        is_endless = math.isinf(trainer.num_training_batches) and not self._has_looked
        self._is_due |= is_endless or trainer.fit_loop.epoch_loop.total_batch_idx % self.every_n_steps == 0
        is_last = batch_idx + 1 == trainer.num_training_batches
        moves = is_last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not (moves and self._is_due) and not (is_last and not self._has_looked):
            return
        self._seen, self._has_looked, self._is_due, self._has_moved = {}, True, False, False
        for name, layer in self._layers(pl_module):
            self._seen[name] = {}
            self._integers[name] = self._followed(layer)
            if not _in_compiled(pl_module):
                look = functools.partial(self._look, trainer, name)
                self._hooks.callback(layer.register_forward_pre_hook(look).remove)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before weights are moved: add the gradient of the penalty, where there is one."""
        self._has_moved = True
        if self.regularize:
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            weights = [layer._parameters.get("weight") for _, layer in self._layers(pl_module)]
            add_kurtosis_gradient([w for w in weights if w is not None and id(w) in owned], self.regularize)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a training batch: log what was seen of it."""
        if self._seen is None:
            return
        self._hooks.close()
        for name, layer in self._layers(pl_module):
            numbers, seen = self._weight(layer), self._seen.setdefault(name, {})
            seen |= self._read(trainer, name)
            seen |= {"weight_db": numbers.db, "weight_spread": numbers.spread, "kurtosis": numbers.kurtosis}
            if name in self._integers and self._has_moved:
                seen["flips"] = float((self._integers[name] != self._followed(layer)).float().mean())
            self._judge(trainer, name, "its weight", numbers)
        self._log(trainer, pl_module, self._seen)
        done = (batch_idx + 1) / max(trainer.num_training_batches, batch_idx + 1)
        self._keep(trainer.current_epoch + done, self._seen)
        self._forget()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when an epoch ends: look at the weights once more."""
        for name, layer in self._layers(pl_module):
            self._judge(trainer, name, "its weight", self._weight(layer))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when fit ends, however it ends: look no longer."""
        self._hooks.close()
        self._forget()

    def _forget(self) -> None:
        self._seen, self._reads, self._integers = None, {}, {}

    def _layers(self, pl_module: LightningModule) -> Iterator[tuple[str, Any]]:
        for name, layer in pl_module.named_modules():
            is_excluded = any(matches(pattern, name, type(layer).__name__) for pattern in self.exclude)
            if isinstance(layer, _LAYERS) and not is_excluded and not _is_lazy(layer):
                yield name, layer

    def _weight(self, layer: Any) -> Numbers:
        return weight_numbers(weight_of(layer), int(isinstance(layer, _TRANSPOSED)), self.bits)

    def _followed(self, layer: Any) -> Tensor:
        return first_integers(weight_of(layer), int(isinstance(layer, _TRANSPOSED)), self.bits)

    def _look(self, trainer: Trainer, name: str, layer: Any, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if self._seen is None or not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            return
        is_linear = isinstance(layer, nn.Linear)
        is_batched = x.dim() == (2 if is_linear else 2 + len(layer.kernel_size))
        x = (x.detach()[:_SAMPLES] if is_batched or (is_linear and x.dim() > 1) else x.detach()).float()
        numbers = input_numbers(x, -1 if is_linear else int(is_batched), self.bits)
        clipped = clipped_share(x, *self._ranges.get(name, (numbers.low, numbers.high)))
        self._reads.setdefault(name, []).append((numbers, clipped))

    def _read(self, trainer: Trainer, name: str) -> dict[str, float]:
        """Return what was seen of what a layer read, in all its calls, and let the range follow these."""
        if not (calls := self._reads.get(name)):
            return {}
        numbers = worst_of([numbers for numbers, _ in calls])
        low, high = self._ranges.get(name, (numbers.low, numbers.high))
        self._ranges[name] = (low + _MOMENTUM * (numbers.low - low), high + _MOMENTUM * (numbers.high - high))
        self._judge(trainer, name, "what it reads", numbers)
        return {
            "input_db": numbers.db,
            "input_spread": numbers.spread,
            "clipped": sum(clipped for _, clipped in calls) / len(calls),
            "drift": (numbers.high - numbers.low) / max(high - low, 1e-12),
        }

    def _judge(self, trainer: Trainer, name: str, what: str, numbers: Numbers) -> None:
        """Warn of a layer that has gone bad, once until it has recovered."""
        key = f"{name}: {what}"
        if numbers.db >= self.alarm_db and numbers.spread <= self.alarm_spread:
            self.bad.pop(key, None)
        elif key not in self.bad:
            self.bad[key] = (
                f"channel {numbers.channel} of {what} reaches {numbers.spread:.3g} times as far as the median one, "
                f"which {self.bits} bits leave {numbers.db:.3g} dB"
            )
            ways_out = _WAYS_OUT.format(name=name)
            warn(
                f"QuantizationMonitor: {name!r} went bad in epoch {trainer.current_epoch}: {self.bad[key]}. {ways_out}."
            )

    def _keep(self, epoch: float, seen: dict[str, dict[str, float]]) -> None:
        """Keep the worse side of each layer, and of many looks every second."""
        sides = {n: [values[key] for key in ("input_db", "weight_db") if key in values] for n, values in seen.items()}
        self.looks.append((epoch, {name: min(both) for name, both in sides.items() if both}))
        if len(self.looks) > _MAX_LOOKS:
            self.looks = self.looks[1::2]

    def _log(self, trainer: Trainer, pl_module: LightningModule, seen: dict[str, dict[str, float]]) -> None:
        scalars = {f"quant/monitor/{name}/{key}": v for name, values in seen.items() for key, v in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        for worst, keys, choose in _WORST:
            values = [values[key] for values in seen.values() for key in keys if key in values]
            if values:
                how: dict[str, Any] = {"sync_dist": True, "reduce_fx": choose.__name__, "batch_size": 1}
                pl_module.log(worst, choose(values), on_step=False, on_epoch=True, logger=bool(trainer.loggers), **how)


_WORST: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("quant/worst_db", ("input_db", "weight_db"), min),
    ("quant/worst_spread", ("input_spread", "weight_spread"), max),
    ("quant/worst_flips", ("flips",), max),
)


def _is_lazy(layer: Any) -> bool:
    """Tell whether a layer has no weight yet, without computing one."""
    return isinstance(layer._parameters.get("weight"), UninitializedParameter)


def _in_compiled(pl_module: LightningModule) -> bool:
    """Tell whether a hook would have something compiled anew."""
    return pl_module.__dict__.get("_compiler_ctx") is not None or any(map(is_compiled, pl_module.modules()))
