"""Plan a module and get it ready to run with fake quantization, without touching its type or parameters."""

from typing import Any

from torch import nn

from lightning_quant import runtimes
from lightning_quant.calibrate.ladder import check_steps
from lightning_quant.errors import PlanError
from lightning_quant.export.static_model import StaticModel
from lightning_quant.graph.analyze import analyze
from lightning_quant.graph.rereads import with_rereads
from lightning_quant.graph.table import Selection
from lightning_quant.layers.leftovers import kept_as_whole, left_in_float
from lightning_quant.planned.overrides import narrow_products, select
from lightning_quant.recipe import recipe as recipes
from lightning_quant.recipe.recipe import AnyRecipe
from lightning_quant.surgery.compilation import scripted_part
from lightning_quant.surgery.host import moved_call, on_host


def prepare(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    recipe: str | AnyRecipe = "int8",
    runtime: str = "onnxruntime",
    selection: Selection | None = None,
    observer: str | None = None,
    module: str = "",
    trains: bool = True,
    may_stay_float: bool = False,
) -> StaticModel:
    """Plan a module from one call and return it ready to be attached; the module is left as it was.

    Args:
        model: the float module.
        args: positional arguments of one real call.
        kwargs: keyword arguments of the same call.
        recipe: numerics, by name or object.
        runtime: name of the runtime whose operator table counts.
        selection: patterns of operators to include and exclude.
        observer: name of the observer; the recipe's training observer by default.
        module: the module's qualified name, for the plan.
        trains: whether it is to be trained through rounding, for which its forward must be traceable in training, too.
        may_stay_float: whether nothing needs to be quantized, since that is what was measured to be best.

    Raises:
        PlanError: nothing can be quantized, for training also where weights are stored alone, or a part is scripted.
        QuantizationError: the recipe has accuracy steps that do not exist, or that its observers do not serve.
    """
    chosen = recipes.get(recipe)
    if not chosen.needs_calibration:
        raise PlanError(f"Expected `recipe` to quantize a graph, but {chosen.name!r} quantizes layers without one.")
    _check_python(model)
    check_steps(chosen)
    chosen.check_percentile(observer or chosen.training_observer)
    runtimes.check_recipe(runtime, chosen)
    table = runtimes.get(runtime, exporting=True).TABLE.on(chosen.activation_grid)
    selection = select(selection or Selection(), chosen)
    on_cpu, (args, kwargs) = on_host(model), moved_call(args, kwargs or {})
    where: dict[str, Any] = {"recipe": chosen.name, "runtime": runtime, "module": module}
    analysis = analyze(on_cpu, args, kwargs, table, selection, **where, trains=trains)
    analysis = with_rereads(analysis, on_cpu, narrow_products(chosen, analysis))
    if trains and analysis.nothing:
        raise PlanError(
            f"{analysis.nothing}{_stored_alone(left_in_float(on_cpu, kept_as_whole(on_cpu, analysis.plan)))}"
        )
    prepared = StaticModel(model, analysis, chosen, observer or chosen.training_observer)
    # What can be refused is refused now; the layers themselves are made of the weights that will be exported.
    prepared.plan = prepared.bound_to(on_cpu).stored_plan()
    if not prepared.plan.num_quantized and not may_stay_float:
        held = f" It holds its weights in {', '.join(sorted(prepared.left))}, which have no quantized form."
        tried = bool(prepared.left) and prepared.runtime.LAYERS_IN_GRAPHS
        raise PlanError(f"{analysis.nothing}{held if tried else _stored_alone(prepared.left)}")
    return prepared


def _check_python(model: nn.Module) -> None:
    if name := scripted_part(model):
        raise PlanError(
            f"Expected modules of Python code, but {name!r} is scripted or traced, which PyTorch's exporter does not "
            "take. Give the module as it was before `torch.jit`, or a child without that part, or take recipe "
            "'int8_dynamic' with `runtime=\"torch\"`, which leaves it as it is."
        )


def _stored_alone(left: frozenset[str]) -> str:
    """Return a way out where graphs round nothing, but weights can be stored in eight bits."""
    if not left:
        return ""
    able = runtimes.that(lambda other: other.LAYERS_IN_GRAPHS)
    return f" Quantized after training, for runtime {able}, its weights are stored in eight bits."
