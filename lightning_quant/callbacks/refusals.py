"""What callbacks refuse before training, and how: as Lightning's own error, which Trainers and command lines know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parameter import is_lazy

from lightning_quant import runtimes
from lightning_quant.arguments.arguments import check_on_device
from lightning_quant.calls.calls import Call
from lightning_quant.capture.capture import find_module
from lightning_quant.capture.checkpoint import weights_fit
from lightning_quant.capture.namespaces import is_overridden
from lightning_quant.doors.settings import CallbackSettings
from lightning_quant.errors import CaptureError, QuantizationError
from lightning_quant.export.engines import AUTO
from lightning_quant.export.working_part import working_part
from lightning_quant.surgery.routing import resolve

Result = TypeVar("Result")

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
# Subclasses of the above that shard parameters or run on devices that nothing here was tried on.
_OTHER_STRATEGIES = ("DeepSpeedStrategy", "SingleDeviceXLAStrategy")


def refused_in_callback(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function; what this package refuses is Lightning's `MisconfigurationException`, as of every callback."""
    try:
        return function(*args)
    except QuantizationError as error:
        raise MisconfigurationException(str(error)) from error


def working_part_of(callback: Any, pl_module: LightningModule) -> str:
    """Say which part of the module that a callback was about to quantize works; nothing where none is known to."""
    exported, runtime = callback.exported, callback.chosen_runtime
    if exported is None or exported.capture.parts or not runtime or not callback.group.is_first:
        return ""
    captured = exported.capture
    module, call = resolve(pl_module, captured.path), Call(captured.args, captured.kwargs)
    settings = callback.settings
    part = working_part(module, call, settings.recipe, runtime, settings.selection)
    if part is None:
        return ""
    path = ".".join(filter(None, (captured.path, part.name)))
    return f'A part of it works: `module="{path}"{part.patterns}`, with {part.share:.0%} of its weights.'


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that shard parameters."""
    bases = [base.__name__ for base in type(trainer.strategy).__mro__]
    if not any(name in bases for name in _STRATEGIES) or any(name in bases for name in _OTHER_STRATEGIES):
        raise QuantizationError(
            f"Expected a strategy out of {_STRATEGIES} (`auto`, `ddp`, `ddp_spawn`), but got {bases[0]}, which "
            "may shard the parameters. Train without this callback, and quantize the consolidated checkpoint "
            "afterwards: PostTrainingQuantization(...).quantize_checkpoint(ckpt_path, model, datamodule)."
        )


def check_names(settings: CallbackSettings, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a runtime that is not installed or does not run the recipe, and a module that there is not."""
    if settings.runtime != AUTO:
        runtimes.get(settings.runtime, exporting=True)
        runtimes.check_recipe(settings.runtime, settings.recipe)
    if settings.module is not None and trainer.lightning_module is not None and _is_configured(pl_module):
        find_module(pl_module, settings.module)


def check_alone(settings: CallbackSettings, number: int) -> None:
    """Refuse to search in several processes."""
    if settings.searches and number > 1:
        raise QuantizationError(
            f"Expected one process to search what keeps the limits, but got {number}. Train without `limits` by name "
            "and `objective`, and search afterwards with `quantize_checkpoint`."
        )


def check_own_folder(folder: Path, others: list[Path]) -> None:
    """Refuse two artifacts in one folder."""
    if folder in others:
        raise QuantizationError(
            f"Expected every quantization callback to have an `output_dir` of its own, but two have {folder}."
        )


def check_initialized(pl_module: LightningModule) -> None:
    """Refuse layers without a shape or without weights."""
    lazy = [name for name, parameter in pl_module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise CaptureError(
            f"Expected every layer to have its shape when fit begins, but {', '.join(lazy[:3])} "
            f"{'is' if len(lazy) == 1 else 'are'} lazy. Run a batch through the model in `configure_model` or `setup`."
        )
    check_on_device(pl_module)


def check_trained_once(path: str, others: list[str]) -> None:
    """Refuse to train a module through rounding that is, holds, or is inside one that another callback so trains."""
    for other in others:
        inner, outer = sorted((path, other), key=len, reverse=True)
        if inner == outer or not outer or inner.startswith(f"{outer}."):
            raise QuantizationError(
                "Expected modules to be trained through one rounding each, but two QuantizationAwareTraining callbacks "
                f"train {inner!r}. Train with one, and let PostTrainingQuantization make the other artifact."
            )


def load_weights(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Give the Trainer's module the weights of a checkpoint; refuse those of another one."""
    with weights_fit(trainer.lightning_module, "the checkpoint"):
        trainer.strategy.load_model_state_dict(checkpoint)


def _is_configured(pl_module: LightningModule) -> bool:
    """Tell whether the module's layers exist before `configure_model` and `setup` have run."""
    late = ("configure_model", "setup")
    return not any(is_overridden(name, pl_module) for name in late) and any(True for _ in pl_module.children())
