"""Where no graph or program can be made, the way without one is named."""

import pytest

from lightning_quant.errors import ExportError, FixedSizesError, PlanError, UntraceableError
from lightning_quant.planned.way_inside import fills_modules, way_inside
from lightning_quant.recipe.recipe import get


def test_recipes_of_layers_on_torch_need_no_program() -> None:
    assert fills_modules(get("int8_weight_only"), "torch")
    assert not fills_modules(get("int8"), "torch")
    assert not fills_modules(get("int8_weight_only"), "onnxruntime")
    assert not fills_modules(get("int8_weight_only"), "auto")


def no_part() -> str:
    return {}["no part"]


@pytest.mark.parametrize("kind", [ExportError, UntraceableError])
def test_refusals_name_it_unless_it_was_taken(kind: type[Exception]) -> None:
    with (
        pytest.raises(kind, match=r"no graph Or quantize layers alone, .* `runtime=\"torch\"`"),
        way_inside(get("int8"), "torch", no_part),
    ):
        raise kind("no graph")
    with pytest.raises(kind, match=r"no graph net works. Or"), way_inside(get("int8"), "torch", lambda: "net works."):
        raise kind("no graph")
    with pytest.raises(kind, match=r"^no graph$"), way_inside(get("int8_dynamic"), "torch", no_part):
        raise kind("no graph")
    with pytest.raises(PlanError, match=r"^other$"), way_inside(get("int8"), "torch", no_part):
        raise PlanError("other")
    # One call of a part does not tell whether its sizes vary.
    with pytest.raises(FixedSizesError, match=r"^sizes Or"), way_inside(get("int8"), "torch", lambda: "net works."):
        raise FixedSizesError("sizes")
