"""Every runtime says what the base class asks for, and nothing else."""

import copy
import pickle

import pytest

from lightning_quant import runtimes
from lightning_quant.runtimes import Runtime

RUNTIMES = tuple(runtimes.names())


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtime_says_what_the_base_class_asks_for_and_nothing_else(name: str) -> None:
    runtime = runtimes.get(name)
    own = {attribute for attribute in vars(type(runtime)) if not attribute.startswith("_")}
    known = {*vars(Runtime), *Runtime.__annotations__}

    assert name == runtime.NAME
    assert own <= known, "a misspelt method is none of the base class's"
    assert all(hasattr(runtime, attribute) for attribute in Runtime.__annotations__)
    # What is declared is there, and what is there is declared.
    assert ({"quantized_edges", "run_forced"} <= own) == runtime.KEEPS_EDGES
    assert bool(runtime.engines()) == ("set_engine" in own)
    assert set(runtime.INTEGER_OPERATORS) == runtime.TABLE.weighted | runtime.TABLE.own_scale
    assert copy.deepcopy(runtime) is runtime
    assert pickle.loads(pickle.dumps(runtime)) is runtime


def test_runtime_without_a_method_cannot_be_made() -> None:
    class Half(Runtime):
        """Has a misspelt `check`."""

        export = load = standalone = count_operators = lambda self, *_, **__: None  # type: ignore[assignment]

        def chekc(self) -> None:
            """Do nothing."""

    with pytest.raises(TypeError, match=r"abstract method '?check"):
        Half()  # type: ignore[abstract]


def test_advice_names_the_runtimes_that_are_capable() -> None:
    assert runtimes.that(lambda runtime: runtime.runs_layers(("dynamic",))) == "'onnxruntime' or 'torch'"
    assert runtimes.that(lambda runtime: runtime.LAYERS_IN_GRAPHS) == "'onnxruntime', 'openvino' or 'torch'"
    assert runtimes.that(lambda runtime: runtime.engines()) == "'torch'"
