"""What the doors share: the same in each of them, handed on by each of them, and written out again without a loss."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from docstring_parser import parse
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_quant as lq
from lightning_quant.callbacks.ptq import Calibration, CalibrationSettings
from lightning_quant.callbacks.qat import TrainingSettings
from lightning_quant.cli import quantize_command
from lightning_quant.cli.quantize_command import Quantizing
from lightning_quant.doors import pipeline
from lightning_quant.doors.settings import CallbackSettings, Settings, explained
from lightning_quant.errors import QuantizationError
from lightning_quant.recipe.recipe import RECIPES, IntegerSpec, LayerRecipe, Recipe
from lightning_quant.report.limits import Limits

# Every argument with a value that is not its default.
OTHERS: dict[str, Any] = {
    "recipe": "int8_accurate",
    "runtime": "torch",
    "output_dir": "elsewhere",
    "include": ["Conv2d", "head"],
    "exclude": ("head.0",),
    "threads": 2,
    "engine": "fastest",
    "dynamic_shapes": {"x": {2: "height"}},
    "sensitivity": True,
    "limits": {"max_size_ratio": 0.3},
    "objective": "latency",
    "max_validations": 5,
    "time_budget_s": 60.0,
    "show_samples": False,
    "module": "net",
    "example": "example_input_array",
    "weights": "best",
    "evaluate": False,
    "limit_eval_batches": 0.5,
    "score_every": 2,
    "score_batches": 0.5,
    "score_with": "runtime",
    "name": "mine",
    "schedule": {"fake_quantize": 0.5, "freeze_batch_norm": math.inf},
    "only_if_needed": {"val_acc": -0.005},
    "distill": {"weight": 0.3, "temperature": 2.0},
    "calibration": {"num_batches": 3, "data": "validation"},
}
KINDS: dict[Any, type[CallbackSettings]] = {
    lq.QuantizationAwareTraining: TrainingSettings,
    lq.PostTrainingQuantization: CalibrationSettings,
}
DOORS: dict[Callable[..., Any], type[Settings]] = {
    lq.QuantizationAwareTraining.__init__: TrainingSettings,
    lq.PostTrainingQuantization.__init__: CalibrationSettings,
    lq.quantize: Settings,
    Quantizing.quantize: CallbackSettings,
    Quantizing.inspect: CallbackSettings,
}
RENAMED = {"output": "output_dir"}
# Training takes no recipes of layers and no lists, a command line no objects, and a plan is of one recipe.
OWN = {
    ("QuantizationAwareTraining.__init__", "recipe"),
    ("QuantizationAwareTraining.__init__", "runtime"),
    ("Quantizing.quantize", "recipe"),
    ("Quantizing.inspect", "recipe"),
    ("Quantizing.inspect", "runtime"),
}


class SeenError(Exception):
    """Ends a door once its settings are known."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings


def see(settings: Any) -> Any:
    raise SeenError(settings)


def shared(door: Callable[..., Any]) -> dict[str, str]:
    """Return the name of each shared argument to the name that the door has for it."""
    names = {RENAMED.get(name, name): name for name in inspect.signature(door).parameters}
    return {name: own for name, own in names.items() if name in DOORS[door].names()}


def documented_arguments(door: Callable[..., Any]) -> dict[str, str]:
    """Return name to text as command lines show them."""
    of_class = {kind.__init__: kind for kind in KINDS}
    params = parse(of_class.get(door, door).__doc__ or "").params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in params}


def test_doors_do_not_drift() -> None:
    seen: dict[str, set[Any]] = {}
    for door in DOORS:
        hints, texts, signature = get_type_hints(door), documented_arguments(door), inspect.signature(door)
        for name, own in shared(door).items():
            default = signature.parameters[own].default
            assert DOORS[door].of({**vars(DOORS[door]()), name: default}) == DOORS[door](), (door, name)
            assert texts[own] == " ".join(explained(DOORS[door])[name].split()), (door, name)
            if (door.__qualname__, name) not in OWN:
                seen.setdefault(name, set()).add((str(hints[own]), default, texts[own]))
    assert set(seen) == set(OTHERS)
    assert {name: ways for name, ways in seen.items() if len(ways) > 1} == {}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_callbacks_arrive_and_are_written_out_again(kind: Any, name: str) -> None:
    if name not in KINDS[kind].names():
        return
    value = {name: OTHERS[name]}
    expected, callback = KINDS[kind](**value), kind(**value)
    assert callback.settings == expected != KINDS[kind]()
    assert getattr(callback, name) == getattr(expected, name)
    assert eval(f"kind({expected.as_code()})").settings == expected
    # Set later, it counts and is checked all the same.
    callback = kind()
    setattr(callback, name, OTHERS[name])
    assert callback.settings == expected


@pytest.mark.parametrize("name", Settings.names())
def test_arguments_of_quantize_arrive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Settings.of
    monkeypatch.setattr(pipeline.Settings, "of", lambda arguments: see(of(arguments)))
    with pytest.raises(SeenError) as seen:
        lq.quantize(nn.Linear(8, 4), **{name: OTHERS[name]})
    assert seen.value.settings == Settings(**{name: OTHERS[name]}) != Settings()


@pytest.mark.parametrize("door", [Quantizing.quantize, Quantizing.inspect])
def test_arguments_of_the_command_line_arrive(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(**arguments: Any) -> Any:
        return see(arguments)

    monkeypatch.setattr(quantize_command, "PostTrainingQuantization", kind)
    monkeypatch.setattr(quantize_command, "Inspection", kind)
    for name, own in shared(door).items():
        with pytest.raises(SeenError) as seen:
            door(None, None, ckpt_path="best.ckpt" if door is Quantizing.quantize else None, **{own: OTHERS[name]})
        assert seen.value.settings[name] == OTHERS[name]


def test_help_of_lightning_cli_has_every_text(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, settings in KINDS.items():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "callback")
        said = "".join(parser.format_help().split())
        missing = [name for name, text in explained(settings).items() if "".join(text.split()) not in said]
        assert missing == []


@pytest.mark.parametrize(
    "recipe",
    [
        *RECIPES.values(),
        Recipe(name="int8_accurate", accuracy_steps=("equalize",)),
        # What an own recipe leaves at its default may be what a named one sets.
        Recipe(name="int8_accurate", accuracy_steps=()),
        Recipe(name="int4_weights", weight=IntegerSpec(8, symmetric=True, per_channel=True), learned_step_rate=0.0),
        Recipe(name="own", weight=IntegerSpec(4, symmetric=True, per_channel=True), overrides={"head": "float"}),
        LayerRecipe("own", ("weight_only_4bit",), floor_db=-math.inf, group_size=16),
        LayerRecipe("int8_dynamic", ("dynamic",), bias_correction=False),
    ],
    ids=lambda recipe: recipe.name,
)
def test_recipes_are_written_out_whole(recipe: Any) -> None:
    settings = CallbackSettings(recipe=recipe)
    assert eval(f"lq.PostTrainingQuantization({settings.as_code()})").recipe == recipe


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"exclude": nn.Linear}, "exclude='Linear'"),
        ({"include": iter(["head", "Conv2d"])}, "include=['head', 'Conv2d']"),
        ({"output_dir": Path("q")}, "output_dir='q'"),
        ({"limits": Limits({"val_f1": math.inf})}, "limits={'max_drop': {'val_f1': float('inf')}}"),
        ({"calibration": Calibration(seed=7)}, "calibration={'seed': 7}"),
        ({"calibration": {"num_batches": 32}, "exclude": [], "threads": None}, ""),
    ],
)
def test_what_is_written_needs_no_import(given: dict[str, Any], written: str) -> None:
    callback = lq.PostTrainingQuantization(**given)
    expected = ", ".join(["'int8'", "'onnxruntime'", *([written] if written else [])])
    assert repr(callback) == f"PostTrainingQuantization({expected})"
    assert repr(eval(f"lq.{callback!r}")) == repr(callback)


def test_an_argument_that_is_set_later_is_checked_when_it_is_used() -> None:
    callback = lq.PostTrainingQuantization()
    callback.threads = "2"  # type: ignore[attr-defined]
    with pytest.raises(QuantizationError, match="`threads` to be a positive integer"):
        _ = callback.settings


def test_a_door_without_an_argument_is_no_door() -> None:
    with pytest.raises(KeyError, match="limits"):
        Settings.of({name: value for name, value in vars(Settings()).items() if name != "limits"})
    with pytest.raises(MisconfigurationException, match="`limits` on metrics only where validation runs"):
        lq.PostTrainingQuantization(evaluate=False, limits={"max_drop": {"val_f1": 0.01}})
