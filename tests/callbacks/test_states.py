"""A callback's state in a checkpoint is told by what is quantized and how, wherever the artifact goes."""

from typing import Any

import pytest

import lightning_quant as lq
from lightning_quant.callbacks.states import state_of


def test_a_state_is_of_its_module_and_recipe_wherever_the_artifact_goes() -> None:
    here, there = (lq.QuantizationAwareTraining(module="net", output_dir=folder) for folder in ("a", "b"))
    assert here.state_key == there.state_key
    others = [
        lq.QuantizationAwareTraining(module="head"),
        lq.QuantizationAwareTraining("int8_reduce_range", module="net"),
        lq.QuantizationAwareTraining(module="net", runtime="openvino"),
    ]
    assert len({here.state_key, *(other.state_key for other in others)}) == 4


@pytest.mark.parametrize("recipe", ["int8", ["int8", "float16"]])
def test_a_key_is_told_without_checking_all_settings_since_every_hook_asks_for_it(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = lq.PostTrainingQuantization(recipe, module="net")
    monkeypatch.setattr(type(callback), "settings", property(lambda _: pytest.fail("settings are checked")))
    assert callback.state_key.endswith("{'recipe': 'int8', 'module': 'net', 'runtime': 'onnxruntime'}")


def test_a_state_that_was_saved_with_the_folder_in_its_name_is_found() -> None:
    callback = lq.QuantizationAwareTraining(module="net", output_dir="b")
    identity = {"runtime": "onnxruntime", "recipe": "int8", "module": "net", "output_dir": "a"}
    old, other = (f"QuantizationAwareTraining{identity | changed}" for changed in ({}, {"module": "head"}))

    assert state_of(
        callback, callback.settings, {old: {"phase": "observe"}, other: {}, "EarlyStopping{'monitor': 'x'}": {}}
    ) == {"phase": "observe"}
    assert (
        state_of(callback, callback.settings, {other: {"phase": "observe"}, "QuantizationAwareTraining{oops": {}})
        is None
    )
