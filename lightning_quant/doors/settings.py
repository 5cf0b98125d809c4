"""What the doors of the package share, documented once and checked once: the callbacks, `quantize`, the command line.

A door spells its arguments out, for editors and for LightningCLI, hands them on with `Settings.of(locals())`, and says
of its own alone what they mean: `documented` adds the others to its docstring.
"""

import dataclasses
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar, get_args

from lightning_quant import runtimes
from lightning_quant.arguments.arguments import (
    check_flag,
    check_key,
    check_limit,
    check_name,
    check_path,
    check_positive,
    check_threads,
    patterns,
)
from lightning_quant.arguments.choice import check_choice
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.arguments.names import (
    Engine,
    Example,
    ExampleName,
    Runtime,
    ScoreWith,
    ScoreWithName,
    Weights,
    WeightsName,
)
from lightning_quant.errors import QuantizationError
from lightning_quant.export.engines import check_engine
from lightning_quant.graph.table import Selection
from lightning_quant.measure.sensitivity import check_rankable
from lightning_quant.planned.sizes import ChosenShapes, chosen_shapes
from lightning_quant.recipe import recipe as recipes
from lightning_quant.recipe.recipe import RECIPES, AnyRecipe
from lightning_quant.report.limits import NO_LIMITS, Limits, check_measured, is_search, limits_from
from lightning_quant.search.objective import SIZE, check_search

Door = TypeVar("Door", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """What every door takes. Made from what a user may write, it holds what that means.

    Attributes:
        recipe: numerics: a name out of `lightning_quant.recipe.RECIPES`, a `Recipe` or `LayerRecipe`, or a dict of
            fields. Recipes of layers (dynamic, weight-only, half precision) are not calibrated. A list makes an
            artifact of each, in a folder of its own below `output_dir`, and one table, the recommended first.
        runtime: where the artifact will run; "auto" tries every installed one and takes the fastest whose parity holds,
            with what was measured in the report. Callbacks do so when fit begins. A list is as of recipes.
        output_dir: the artifact's folder; by default "quantized", beside the logs where there is a Trainer and else in
            the working directory. An artifact there is replaced.
        include: fnmatch patterns on qualified names and layer types of what may be quantized; one alone may be a text.
        exclude: likewise, of what stays float.
        threads: for the latencies in the report; torch's number of threads by default.
        engine: whose kernels run a static recipe on runtime "torch": by default the first whose parity holds, in an
            order of their own; "fastest" measures those whose parity holds, with what was measured in the report, so
            that equal runs may end with different ones.
        dynamic_shapes: input name to dimension to its name, for dimensions beside the batch that may vary; "static"
            keeps all sizes of the captured call, the batch among them.
        sensitivity: whether the report says which operator costs what, with the final weights and ranges: it runs the
            module four to six times for each operator, on two batches, and the validation loop, where there is one,
            twice for the worst operator. For recipes that are calibrated, in one process.
        limits: what the artifact must keep to, such as `{"max_drop": {"val_f1": 0.01}, "max_size_ratio": 0.3}`, see
            `lightning_quant.report.limits.Limits`; one that is missed is a warning, and exit code 1 of every command.
            By the names of what they are on, `{"val_f1": -0.01, "size_ratio": 0.3, "speedup": 1.5}`, they are searched:
            of a metric the change that is allowed, in its worse direction; "size_bytes", "latency_ms", "peak_memory_mb"
            and "peak_memory_ratio" bound as well. The whole recipe comes first; where it misses one, what costs
            most goes to eight bits or float, as little as the file's validation asks for. `quantize` has `evaluate`.
        objective: what the search makes best among all that keep the limits: "size", "latency", or a metric. By default
            "size" with limits by name, and no search with limits by the fields of `Limits`, which are checked alone.
        max_validations: readings of validation data that a search may take; ceil(log2(n)) + 3 of n steps by default.
        time_budget_s: seconds after which the search tries nothing more; the best so far is written then, as it is when
            the run is interrupted.
        show_samples: whether report.html shows samples whose prediction changed, an image small and tokens as text. The
            artifact has the captured call in any case, which `verify` runs.

    Raises:
        QuantizationError: an argument is wrong; the message has the way out.
    """

    recipe: AnyRecipe = RECIPES["int8"]
    runtime: Runtime = "onnxruntime"
    output_dir: str | os.PathLike[str] | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    threads: int | None = None
    engine: Engine = "auto"
    dynamic_shapes: ChosenShapes = None
    sensitivity: bool = False
    limits: Limits = NO_LIMITS
    objective: str | None = None
    max_validations: int | None = None
    time_budget_s: float | None = None
    show_samples: bool = True

    def __post_init__(self) -> None:
        if self.objective is None and is_search(self.limits):
            self._hold("objective", SIZE)
        _check_one(self.recipe, self.runtime)
        self._hold("recipe", recipes.get(self.recipe))
        self._hold("include", patterns("include", self.include))
        self._hold("exclude", patterns("exclude", self.exclude))
        self._hold("limits", limits_from(self.limits))
        runtimes.check_name(self.runtime)
        check_engine(self.runtime, self.engine)
        check_path("output_dir", self.output_dir)
        check_threads(self.threads)
        check_flag("sensitivity", self.sensitivity)
        check_flag("show_samples", self.show_samples)
        chosen_shapes(self.dynamic_shapes)
        check_rankable(self.recipe, sensitivity=self.sensitivity)
        check_search(self.objective, self.max_validations, self.time_budget_s)

    @property
    def searches(self) -> bool:
        """Whether what keeps the limits is searched for."""
        return self.objective is not None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Return the settings among a door's arguments, each of which it must have by its name."""
        return cls(**{name: arguments[name] for name in cls.names()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the arguments."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a door that takes a part of the settings alone has of them."""
        return {name: value for name, value in arguments.items() if name in cls.names()}

    @property
    def selection(self) -> Selection:
        """Which operators the user wants quantized."""
        return Selection(self.include, self.exclude)

    def as_code(self, **known: Any) -> str:
        """Return the arguments of a call that gives these settings again, as Python without an import.

        Args:
            **known: what is known by now, to stand in place of what was given.
        """
        values = {**vars(self), "recipe": recipes.spelled(self.recipe), **known}
        # One pattern alone may be a text.
        values |= {n: values[n][0] for n in ("include", "exclude") if len(values[n]) == 1 and values[n] != ("*",)}
        named = (field.name for field in fields(self)[2:] if values[field.name] not in _defaults(field))
        return ", ".join(
            [_as_code(values["recipe"]), _as_code(values["runtime"]), *(f"{n}={_as_code(values[n])}" for n in named)]
        )

    def _hold(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class CallbackSettings(Settings):
    """What both callbacks take.

    Attributes:
        module: name of the module to quantize; by default the outermost one with layers to quantize that
            `training_step` calls.
        example: what the call to export comes from: "train_batch", with the arguments that validation has where those
            differ; "predict_batch", with those of `predict_step`; or "example_input_array".
        weights: "last", or "best": those of ModelCheckpoint's best checkpoint, and with trained ranges these from the
            same file; the last where that is from before rounding, or has more bits and was best by no twin's score.
        evaluate: whether to run the validation loop on the float, the simulated and the exported model.
        limit_eval_batches: number or share of validation batches for that; the trainer's limit by default.
        score_every: score every n-th validation in training, the first one among them, and each where a callback
            watches a score: the same batches, with the same random numbers, also go through the integers that the
            present weights would be exported as. ModelCheckpoint, EarlyStopping, loggers and the progress bar get
            "quant/twin/<metric>" and "quant/twin_delta/<metric>", the difference to float weights. Ranges are those of
            training; where it has none, of a training batch for each 64 of validation, four at most, no steps on top.
        score_batches: number or share of the validation batches that scores are of, evenly over each loader of known
            length; float weights are run on these as well. One of 24 by default, one at least, which cost 0.1 to 0.4
            of a validation as measured; 1.0 takes all, for up to two. While training rounds, validation itself runs the
            integers: metrics are then of all batches either way, and differences of these.
        score_with: "simulation", the exact arithmetic of integer kernels, or "runtime": a file is exported for each
            score, and run.
        name: what its keys in loggers begin with: "quant/<name>/". By default "quant/", and where a Trainer has several
            of these callbacks "quant/<recipe>-<runtime>/".
    """

    module: str | None = None
    example: Example = "train_batch"
    weights: Weights = "last"
    evaluate: bool = True
    limit_eval_batches: int | float | None = None
    score_every: int | None = None
    score_batches: int | float | None = None
    score_with: ScoreWith = "simulation"
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_key("name", self.name)
        check_name("module", self.module, "the LightningModule")
        check_choice("example", self.example, get_args(ExampleName))
        check_choice("weights", self.weights, get_args(WeightsName))
        check_flag("evaluate", self.evaluate)
        check_limit("limit_eval_batches", self.limit_eval_batches)
        self._check_scores()
        if not self.evaluate:
            check_measured(self.limits, "got `evaluate=False`")

    def _check_scores(self) -> None:
        check_choice("score_with", self.score_with, get_args(ScoreWithName))
        check_limit("score_batches", self.score_batches)
        if self.score_every is not None:
            check_positive("score_every", self.score_every, " or None")


def _check_one(recipe: Any, runtime: Any) -> None:
    """Refuse lists where there is one artifact."""
    lists = [name for name, value in (("recipe", recipe), ("runtime", runtime)) if isinstance(value, list | tuple)]
    if lists:
        raise QuantizationError(
            f"Expected one `{lists[0]}` here, but got a list. Several artifacts of one training are made by "
            "PostTrainingQuantization, `quantize` and `lightning-quant sweep`; beside QuantizationAwareTraining, which "
            "trains through the rounding of one, PostTrainingQuantization makes the others."
        )


def documented(settings: type[Settings], **renamed: str) -> Callable[[Door], Door]:
    """Add what settings say of arguments to a door's docstring, in their order, and answer arguments that it lacks.

    Args:
        settings: whose docstring has them.
        **renamed: argument of the door to the name that the settings know it by.
    """

    def add(door: Door) -> Door:
        if door.__doc__ is not None:  # as it is with `python -OO`
            shared = explained(settings)
            texts = {
                name: shared[renamed.get(name, name)] for name in _parameters(door) if renamed.get(name, name) in shared
            }
            before, own, after = _sections(door.__doc__, "Args")
            entries = [f"    {name}: {(texts | own)[name]}" for name in _parameters(door)]
            door.__doc__ = "\n".join([*before, "Args:", *entries, *after])
        return known_arguments(door)

    return add


def explained(settings: type[Settings]) -> dict[str, str]:
    """Return what settings say of each argument, by its name."""
    classes = [kind for kind in reversed(settings.__mro__) if issubclass(kind, Settings)]
    return {name: text for kind in classes for name, text in _sections(kind.__doc__ or "", "Attributes")[1].items()}


def _parameters(door: Callable[..., Any]) -> list[str]:
    function = door.__init__ if isinstance(door, type) else door  # type: ignore[misc]
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _sections(docstring: str, title: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Return a docstring in Google's style as the lines before a section, its entries by name, and the lines after."""
    lines = inspect.cleandoc(docstring).splitlines()
    if f"{title}:" in lines:
        start = lines.index(f"{title}:")
        end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("    ")), len(lines))
    else:
        start = end = next((i for i, line in enumerate(lines) if re.fullmatch(r"[A-Z]\w+:", line)), len(lines))
    entries = re.findall(r"^    \**(\w+): (.*(?:\n     .*)*)", "\n".join(lines[start + 1 : end]), re.MULTILINE)
    return lines[:start], dict(entries), lines[end:] if start < end else ["", *lines[end:]]


def _defaults(field: "dataclasses.Field[Any]") -> tuple[Any, ...]:
    made = () if field.default_factory is dataclasses.MISSING else (field.default_factory(),)
    return (field.default, *made)


def _as_code(value: Any) -> str:
    """Return Python that the doors take as this value: objects as dicts of what is not the default."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        value = {field.name: given[field.name] for field in fields(value) if given[field.name] not in _defaults(field)}
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_as_code(key)}: {_as_code(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_code, value))}]"
    return repr(value)
