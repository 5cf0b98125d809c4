"""Names that arguments take, as types: editors complete them, and type checkers refuse others.

Parsers of command lines and YAML see `| str` beside them and so leave a wrong name to our own message, which says what
was meant. A new runtime, recipe or observer is one word here.
"""

from typing import TYPE_CHECKING, Any, Literal

RecipeName = Literal[
    "int8",
    "int8_accurate",
    "int4_weights",
    "int4",
    "int2_weights",
    "int8_reduce_range",
    "int8_dynamic",
    "int8_weight_only",
    "int4_weight_only",
    "int8_weight_only_gptq",
    "int4_weight_only_gptq",
    "float16",
    "bfloat16",
]
RuntimeName = Literal["auto", "executorch", "inductor", "onnxruntime", "openvino", "torch"]
EngineName = Literal["auto", "fastest", "onednn", "x86", "fbgemm", "qnnpack"]
ObserverName = Literal["min_max", "moving_average", "percentile", "mse"]
WeightsName = Literal["last", "best"]
ExampleName = Literal["train_batch", "predict_batch", "example_input_array"]
UnitName = Literal["fraction", "epochs", "steps"]
DataName = Literal["train", "validation"]
ScoreWithName = Literal["simulation", "runtime"]

# `RECIPES` and `OBSERVERS` may be added to, so that these are open to type checkers as well.
Recipes = RecipeName | str
Observers = ObserverName | str
# Of these each makes an artifact.
SeveralRecipes = list[RecipeName | str | dict[str, Any]]
if TYPE_CHECKING:
    Runtime = RuntimeName
    SeveralRuntimes = list[RuntimeName]
    Engine = EngineName
    Weights = WeightsName
    Example = ExampleName
    Unit = UnitName
    Data = DataName
    ScoreWith = ScoreWithName
else:
    Runtime = RuntimeName | str
    SeveralRuntimes = list[RuntimeName | str]
    Engine = EngineName | str
    Weights = WeightsName | str
    Example = ExampleName | str
    Unit = UnitName | str
    Data = DataName | str
    ScoreWith = ScoreWithName | str
