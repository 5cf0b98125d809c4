from pathlib import Path
from typing import Any

import pytest

from lightning_quant.doors.settings import Settings
from lightning_quant.doors.several import is_several, several
from lightning_quant.errors import QuantizationError


def named(**arguments: Any) -> dict[str, Settings]:
    return several(Settings, {**vars(Settings()), "output_dir": "all", **arguments})


def test_each_recipe_on_each_runtime_has_a_name_and_a_folder() -> None:
    found = named(recipe=["int8", {"name": "my own/recipe"}, "int8"], runtime=("torch", "auto"))
    assert list(found) == ["int8-torch", "int8-auto", "my_own_recipe-torch", "my_own_recipe-auto"]
    assert [Path(s.output_dir or "").name for s in found.values()] == list(found)
    assert [s.runtime for s in found.values()] == ["torch", "auto"] * 2
    # Of one name, and no way out of the folder.
    found = named(recipe=[{"name": ".."}, {"name": "..", "bias_correction": False}])
    assert list(found) == ["recipe-onnxruntime", "recipe-onnxruntime-2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": []}, "empty list"),
        ({"runtime": []}, "empty list"),
        ({"recipe": ["int8", "int9"]}, "Did you mean"),
        ({"recipe": ["int8", ["int8"]]}, "one of"),
        ({"runtime": ["torch", "onnx"]}, "Did you mean"),
        ({"recipe": ["int8"], "threads": 0}, "threads"),
    ],
)
def test_a_wrong_item_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        named(**arguments)


def test_a_list_is_what_asks_for_several() -> None:
    assert is_several(["int8"], "torch")
    assert is_several("int8", ("torch",))
    assert not is_several({"name": "int8"}, "torch")
    for lists in ({"recipe": ["int8"]}, {"runtime": ["torch"]}):
        with pytest.raises(QuantizationError, match="PostTrainingQuantization makes the others"):
            Settings(**lists)  # type: ignore[arg-type]
