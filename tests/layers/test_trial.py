"""Which scheme a layer gets, and the reason for it in the plan."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layer_models import Around
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.errors import PlanError, QuantizationError
from lightning_quant.graph.plan import Row
from lightning_quant.graph.table import Selection
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import LayerRecipe, get


def rows_of(model: nn.Module, *args: Any, recipe: Any = "int8_weight_only", **options: Any) -> dict[str, Row]:
    """Quantize and return the plan's rows by name."""
    return {row.name: row for row in quantize_layers(model.eval(), args, recipe=recipe, **options).plan.rows}


def heavy_tailed(layer: nn.Linear) -> nn.Linear:
    """Put one value into every row that leaves one step of eight bits for all others."""
    with torch.no_grad():
        layer.weight[:, 0] = 1e3
    return layer


class Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def silent_input(*shape: int) -> Tensor:
    """Return an input that is zero where `heavy_tailed` weights are loud."""
    x = torch.randn(*shape)
    x[..., 0] = 0
    return x


# --- the floor


def test_layer_under_the_floor_gets_the_next_scheme() -> None:
    # Eight bits are too few for rows of this range, and the weights do not read what is loud.
    x = torch.randn(4, 32)
    x[:, 0] = 1e5
    layer = nn.Linear(32, 16)
    with torch.no_grad():
        layer.weight[:, 0] = 0
    rows = rows_of(Around(layer), x, recipe="int8_dynamic")

    assert rows["layer"].action == "int8 weights"
    assert rows["layer"].reason.startswith("int8 dynamic: ")
    assert rows["layer"].reason.endswith(" dB signal-to-noise where 20 are wanted")


def test_layer_for_which_no_scheme_is_enough_stays_float() -> None:
    model = Two(heavy_tailed(nn.Linear(32, 16)), nn.Linear(16, 4))
    rows = rows_of(model, silent_input(8, 32), recipe="int8_dynamic")

    assert rows["first"].action == "float"
    assert "int8 dynamic: " in rows["first"].reason
    assert "int8 weights: " in rows["first"].reason
    assert rows["second"] == Row("second", "Linear", "int8 dynamic", "", 8 * 16 * 4, 16 * 4)


def test_floor_is_the_users() -> None:
    model, x = Two(nn.Linear(32, 16), nn.Linear(16, 4)), torch.randn(8, 32)
    fine = rows_of(model, x, recipe={"name": "int8_weight_only", "floor_db": 30})
    assert {row.action for row in fine.values()} == {"int8 weights"}
    with pytest.raises(PlanError, match=r"nothing can be quantized: first \(Linear\): int8 weights: .* 200 are wanted"):
        rows_of(model, x, recipe={"name": "int8_weight_only", "floor_db": 200})


def test_overflow_of_half_precision_is_seen() -> None:
    model = Two(nn.Linear(32, 16), nn.Linear(16, 4))
    with torch.no_grad():
        model.first.weight[0, 0] = 1e6
    rows = rows_of(model, silent_input(8, 32), recipe="float16")
    assert rows["first"].action == "float"
    assert rows["second"].action == "float16"


def test_every_call_of_a_layer_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = heavy_tailed(nn.Linear(32, 32))
            self.other = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            loud = self.layer(torch.ones_like(x))
            return self.other(loud) + self.layer(x)

    rows = rows_of(Twice(), silent_input(8, 32))
    assert rows["layer"].action == "float"
    assert rows["layer"].macs == 2 * 8 * 32 * 32


def test_user_hooks_do_not_disturb_the_trial_and_run_on_the_stored_layer() -> None:
    model, x = Two(nn.Linear(32, 16), nn.Linear(16, 4)), torch.randn(8, 32)
    seen = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(type(module)) or output * 3)
    result = quantize_layers(model.eval(), (x,), recipe="int8_weight_only")
    assert [row.action for row in result.plan.rows] == ["int8 weights"] * 2
    seen.clear()
    with torch.no_grad():
        expected = model(x)
        actual = result.quantized()(x)
    assert len(seen) == 2
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.05)
    assert len(model.first._forward_hooks) == 1


def test_hooks_are_not_copied_with_what_they_are_bound_to() -> None:
    class Watcher:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

        def watch(self, *_: Any) -> None:
            pass

    model, watcher = Two(nn.Linear(32, 16), nn.Linear(16, 4)), Watcher()
    model.first.register_forward_hook(watcher.watch)
    model.second.register_full_backward_hook(watcher.watch)
    rows = rows_of(model, torch.randn(8, 32))
    assert {row.action for row in rows.values()} == {"int8 weights"}


# --- layers that are not called


class Unused(nn.Module):
    def __init__(self, spare: nn.Module) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(32, 16), spare

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layer_that_is_never_called_is_judged_by_its_weights() -> None:
    x = torch.randn(8, 32)
    rows = rows_of(Unused(nn.Linear(32, 16)), x, recipe="int8_dynamic")
    assert rows["spare"].action == "int8 weights"
    assert rows["spare"].reason == "not called on the captured call: judged by its weights"
    assert rows["spare"].macs == 0
    assert rows["used"].action == "int8 dynamic"
    recurrent = rows_of(Unused(nn.LSTM(32, 16)), x)
    assert recurrent["spare"].action == "int8 weights"
    spread = nn.Linear(32, 16)
    with torch.no_grad():
        spread.weight.copy_(torch.full((16, 32), 0.3))
        spread.weight[:, 0] = 100.0
    # The step is 0.79: what is 0.3 is lost, at 35.5 dB.
    recipe = {"name": "int8_weight_only", "floor_db": 34}
    assert rows_of(Unused(spread), x, recipe=recipe)["spare"].action == "int8 weights"
    result = rows_of(Unused(spread), x, recipe={**recipe, "floor_db": 37})["spare"]
    assert result.action == "float"
    assert "int8 weights: 35.5 dB signal-to-noise where 37 are wanted" in result.reason


# --- what has no form


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


def test_layers_without_a_form_have_a_row_and_a_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled, self.own, self.replaced = Scaled(32, 32), Own(), nn.Linear(32, 32)
            self.hooked, self.bilinear, self.plain = nn.Linear(32, 32), nn.Bilinear(32, 32, 8), nn.Linear(32, 32)
            self.replaced.forward = lambda x: x * 2
            self.hooked.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

        def forward(self, x: Tensor) -> Tensor:
            x = self.plain(self.hooked(self.replaced(self.own(self.scaled(x)))))
            return self.bilinear(x, x)

    rows = rows_of(Mixed(), torch.randn(3, 32))
    assert {name: row.reason for name, row in rows.items() if row.action == "float"} == {
        "own": "no quantized form of Own",
        "replaced": "its forward was replaced by another one",
        "hooked": "it has forward pre-hooks",
    }
    assert rows["plain"].action == rows["bilinear"].action == "int8 weights"
    assert rows["own"].weights == 32


def test_pre_hook_beside_a_computed_weight_is_not_lost() -> None:
    from torch.nn.utils import prune

    layer = nn.Linear(32, 16)
    prune.l1_unstructured(layer, "weight", 0.5)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 5,))
    rows = rows_of(Two(layer, nn.Linear(16, 4)), torch.randn(8, 32))
    assert (rows["first"].action, rows["first"].reason) == ("float", "it has forward pre-hooks")


def test_subclass_with_the_forward_of_its_base_is_quantized() -> None:
    class Named(nn.Linear):
        pass

    assert rows_of(Around(Named(32, 16)), torch.randn(3, 32))["layer"].action == "int8 weights"


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_layer_by_itself(runtime: str, tmp_path: Path) -> None:
    layer, x = nn.LSTM(6, 16, batch_first=True).eval(), torch.randn(4, 5, 6)
    artifact = quantize(layer, "int8_dynamic", runtime, calibration_data=[x], output_dir=tmp_path)
    output, (hidden, cell) = load(tmp_path)(x)

    assert [(row["name"], row["action"]) for row in artifact.report["plan"]["rows"]] == [("LSTM", "int8 weights")]
    for expected, actual in zip((layer(x)[0], *layer(x)[1]), (output, hidden, cell), strict=True):
        assert signal_to_noise(expected, actual) > 30
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("recipe", ["int8_dynamic", "int8_weight_only", "int4_weight_only", "float16", "bfloat16"])
def test_module_with_no_layer_of_the_recipe(recipe: str) -> None:
    with pytest.raises(PlanError, match=r"Sequential to have a layer for recipe '.*', but .*it has no such layer"):
        rows_of(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), torch.randn(2, 4), recipe=recipe)
    with pytest.raises(PlanError, match="no quantized form of Own"):
        rows_of(nn.Sequential(Own()), torch.randn(2, 32), recipe=recipe)


# --- include and exclude


def test_include_and_exclude() -> None:
    model, x = Two(nn.Linear(32, 16), nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))), torch.randn(8, 32)
    rows = rows_of(model, x, selection=Selection(exclude=("second",)))
    assert {name: row.reason for name, row in rows.items()} == {
        "first": "",
        "second.0": 'excluded by "second"',
        "second.1": 'excluded by "second"',
    }
    rows = rows_of(model, x, selection=Selection(include=("second.*",)))
    assert [rows[name].action for name in ("first", "second.0")] == ["float", "int8 weights"]
    assert rows["first"].reason == "not in `include`"
    with pytest.raises(PlanError, match=r"`exclude` .*'encoder', which matches nothing"):
        rows_of(model, x, selection=Selection(exclude=("encoder",)))
    with pytest.raises(PlanError, match="nothing can be quantized"):
        rows_of(model, x, selection=Selection(exclude=("Linear",)))


def test_excluded_attention_stays_float_as_a_whole() -> None:
    model = nn.TransformerDecoderLayer(32, 2, 64, batch_first=True)
    x = torch.randn(2, 5, 32)
    result = quantize_layers(
        model.eval(), (x, x), recipe="int8_weight_only", selection=Selection(exclude=("self_attn",))
    )
    rows = {row.name: row.action for row in result.plan.rows}
    assert rows["self_attn"] == "float"
    assert not [row.name for row in result.plan.rows if row.name.startswith("self_attn.") and row.weights]
    assert rows["multihead_attn"] == "int8 weights"


# --- recipes that cannot be


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"schemes": ("int3",)}, r"schemes` to be one of \[.*'bfloat16'\], but got 'int3'"),
        ({"schemes": ()}, r"`schemes` to be out of .*, but got \[\]"),
        ({"schemes": ("weight_only_4bit",), "group_size": 0}, "`group_size` to be a positive integer, but got 0"),
    ],
)
def test_wrong_recipe(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        rows_of(Around(nn.Linear(4, 4)), torch.randn(2, 4), recipe=LayerRecipe("mine", **recipe))


def test_recipe_that_needs_a_graph() -> None:
    with pytest.raises(PlanError, match="'int8' needs `prepare` and calibration"):
        rows_of(Around(nn.Linear(4, 4)), torch.randn(2, 4), recipe=get("int8"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("recipe", ["int8_dynamic", "int8_weight_only", "float16", "int4_weight_only"])
def test_weights_without_values_stay_float(recipe: str) -> None:
    class Net(nn.Module):
        """Has no categories, as models of tables may."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.narrow = nn.Embedding(0, 4), nn.Embedding(4, 0)
            self.none, self.to_none, self.rest = nn.Linear(0, 64), nn.Linear(64, 0), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(x) + self.none(self.to_none(x)) + self.none(self.narrow(x.new_zeros(1).long()))

    torch.manual_seed(0)
    quantized = quantize_layers(Net().eval(), (torch.randn(4, 64),), recipe=recipe, runtime="torch")
    rows = {row.name: row for row in quantized.plan.rows}
    assert rows["rest"].action != "float"
    empty = ("table", "narrow", "none", "to_none")
    assert {rows[name].reason for name in empty if name in rows} == {"it has a weight without values"}
