"""The whole path without a Trainer: calibrate, convert, export, measure."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_quant.arguments.arguments import check_name, check_on_device
from lightning_quant.arguments.names import Engine, Recipes, Runtime, SeveralRecipes, SeveralRuntimes
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.folder import output_folder
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.capture.calibration_data import CalibrationCalls
from lightning_quant.capture.checkpoint import load_module
from lightning_quant.doors.evaluated import evaluated
from lightning_quant.doors.making import check_runs, make_artifact, make_artifacts
from lightning_quant.doors.settings import Settings, documented
from lightning_quant.doors.several import is_several, several
from lightning_quant.errors import QuantizationError
from lightning_quant.planned.sizes import ChosenShapes
from lightning_quant.recipe.recipe import AnyRecipe
from lightning_quant.report.limits import Limits, check_measured, limits_from
from lightning_quant.surgery.compilation import is_compiled
from lightning_quant.surgery.host import device_for_search, on_host
from lightning_quant.surgery.process import alone
from lightning_quant.surgery.routing import device_of


@documented(Settings)
def quantize(  # noqa: D417  `documented` adds the shared ones
    model_or_checkpoint: nn.Module | str | os.PathLike[str],
    recipe: SeveralRecipes | Recipes | dict[str, Any] | AnyRecipe = "int8",
    runtime: SeveralRuntimes | Runtime = "onnxruntime",
    *,
    calibration_data: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    include: str | list[str] | tuple[str, ...] = ("*",),
    exclude: str | list[str] | tuple[str, ...] = (),
    dynamic_shapes: ChosenShapes = None,
    threads: int | None = None,
    sensitivity: bool = False,
    engine: Engine = "auto",
    lightning_module: nn.Module | type[nn.Module] | None = None,
    module: str | None = None,
    trust_checkpoint: bool = False,
    limits: Limits | dict[str, Any] | None = None,
    objective: str | None = None,
    max_validations: int | None = None,
    time_budget_s: float | None = None,
    show_samples: bool = True,
    evaluate: Callable[[nn.Module], Any] | None = None,
) -> Artifact:
    """Quantize a trained float module and write the artifact; the module itself stays as it is.

    Args:
        model_or_checkpoint: the float module, or the path of a Lightning checkpoint.
        calibration_data: a DataLoader or LightningDataModule, of whose batches the first 32 are cut to what the module
            takes, by name or by number, with a warning of what is left out; or any iterable of calls, each a tensor, a
            tuple of arguments or a dict of keyword arguments; or one tensor. Batches as in training; a few hundred
            samples are enough. Recipes of layers need one call, to try the layers on.
        lightning_module: of a checkpoint: its LightningModule's class, or an instance, which gets the weights.
        module: of a checkpoint: qualified name of the module to quantize, whose calls `calibration_data` holds; the
            LightningModule's own forward by default.
        trust_checkpoint: whether to load more of it than tensors and plain values, such as hyperparameters of any
            class, which runs code of whoever wrote the file.
        evaluate: function of a module, the float one or an exported file, to its metrics: a dict of numbers, or of the
            values of all samples, whose mean then counts and which intervals are made of; or one of these, called
            "metric". A generator yields them part by part, and may yield a metric of torchmetrics after each of its
            updates, whose intervals are then made of these. What limits on metrics are about.

    Raises:
        QuantizationError: an argument is wrong or a stage failed; nothing is half written.

    Warns:
        NoEffectWarning: for each warning in the report: failed parity, a failed recipe, a missed limit, a larger or
            slower file.
    """
    given = locals()
    names = several(Settings, given) if is_several(recipe, runtime) else {"": Settings.of(given)}
    if evaluate is None:
        why_not = "`quantize` runs none: use its `evaluate`, or PostTrainingQuantization and its `quantize_checkpoint`"
        check_measured(limits_from(limits), why_not)
    with alone():
        if "" in names:
            check_runs(names[""])
        model = _float_module(model_or_checkpoint, lightning_module, module, trust=trust_checkpoint)
        if device_for_search(device_of(model)) != device_of(model):
            model = on_host(model)
        judged = evaluated(evaluate, model, next(iter(names.values())))
        data = CalibrationCalls(model, calibration_data)
        if "" in names:
            folder = artifacts.check_folder(output_dir if output_dir is not None else "quantized")
            return make_artifact(model, judged, data, names[""], folder)[0]
        return make_artifacts(model, judged, data, names, output_folder(output_dir or "quantized"))


def _float_module(
    model_or_checkpoint: nn.Module | str | os.PathLike[str],
    lightning_module: nn.Module | type[nn.Module] | None,
    module: str | None,
    *,
    trust: bool,
) -> nn.Module:
    if isinstance(model_or_checkpoint, str | os.PathLike):
        check_name("module", module, "the LightningModule")
        model = load_module(model_or_checkpoint, lightning_module, module, trust=trust)
        check_on_device(model)
        return model
    if not isinstance(model_or_checkpoint, nn.Module):
        raise QuantizationError(_no_module(model_or_checkpoint))
    if isinstance(model_or_checkpoint, LoadedModule):
        raise QuantizationError("Expected a float module, but got a loaded artifact, which is quantized already.")
    if isinstance(model_or_checkpoint, torch.jit.ScriptModule) or _is_exported(model_or_checkpoint):
        raise QuantizationError(
            f"Expected a module with Python code of its own, but got a {type(model_or_checkpoint).__name__}: give the "
            "module that it was made from."
        )
    while is_compiled(model_or_checkpoint):
        model_or_checkpoint = model_or_checkpoint.get_submodule("_orig_mod")
    check_on_device(model_or_checkpoint)
    if lightning_module is not None or module is not None:
        raise QuantizationError(
            "Expected `lightning_module` and `module` with the path of a checkpoint only, but got them with a module: "
            "give the module to quantize itself."
        )
    return model_or_checkpoint


def _is_exported(module: nn.Module) -> bool:
    """Tell whether a module is what `torch.export` made, which has operators in place of layers."""
    graph = module.graph if isinstance(module, torch.fx.GraphModule) else None
    return graph is not None and any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes)


def _no_module(given: Any) -> str:
    """Return what to say of something that is neither a module nor a path."""
    got, way_out = f"{given!r:.60}", ""
    # By name, since this room does without Lightning, whose classes go by two names as well.
    kinds = {kind.__name__ for kind in type(given).__mro__}
    parts = list(given.values()) if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else []
    if isinstance(given, type):
        got, way_out = f"the class {given.__name__}", f" Give an instance: `{given.__name__}(...)`."
    elif parts and all(isinstance(part, nn.Module) for part in parts):
        got = f"a {type(given).__name__} of modules"
        way_out = " Give the module that calls them: `nn.Sequential(*layers)`, say."
    elif isinstance(given, Mapping):
        got = "a dict"
        way_out = " Of a state dict: build the module, `module.load_state_dict(...)`, and give the module."
    elif "Trainer" in kinds:
        got, way_out = "a Trainer", " Give the LightningModule: `trainer.lightning_module`, or a part of it."
    elif "Callback" in kinds:
        got, way_out = f"{type(given).__name__}", " Give the module; a callback goes to `Trainer(callbacks=[...])`."
    elif callable(given) or isinstance(given, torch.export.ExportedProgram):
        got, way_out = f"{type(given).__name__}", " Give the module that it was made from."
    return f"Expected a float `nn.Module` or the path of a Lightning checkpoint, but got {got}.{way_out}"
