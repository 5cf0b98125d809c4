"""Mixed precision by hand: what overrides name is float, on another grid, or stored by a recipe of layers."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lightning_models import fit, seeded
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import NoEffectWarning, PlanError, QuantizationError
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.measure.sensitivity import sensitivity
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import Recipe, get
from lightning_quant.simulate.prepared import Prepared


class Vision(nn.Module):
    """Convolutions under `features`, and a large classifier."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.features = nn.Sequential(first, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.classifier = nn.Linear(128, 64)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).flatten(1))


class Reader(nn.Module):
    """A table of vectors, a recurrence that cannot be traced, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, 32)
        self.recurrence = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrence(self.embedding(tokens))[0][:, -1])


def vision() -> Vision:
    torch.manual_seed(0)
    return Vision().eval()


def images(number: int = 8) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ready(model: nn.Module, x: Tensor, overrides: dict[str, str], **fields: Any) -> Prepared:
    prepared = prepare(model, (x,), recipe=Recipe(overrides=overrides, **fields), observer="mse")
    calibrate(prepared, steps_of(prepared, [x]))
    return prepared


def test_float_and_other_grids() -> None:
    overrides = {"features.0.*": "float", "features.1": "int4_weights", "Linear": "int5_weights"}
    prepared = ready(vision(), images(), overrides)
    rows = {row.name: row for row in prepared.plan.rows}
    assert (rows["features.0.0"].action, rows["features.0.0"].reason) == ("float", 'excluded by "features.0.*"')
    largest = {o.key: prepared.weight_integers(i, prepared.folded(i)).abs().max() for i, o in _weighted(prepared)}
    assert {name: int(value) for name, value in largest.items()} == {"features.1": 7, "classifier": 15}
    check_agreement(prepared, convert(prepared), (images(),), {})


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_weights_of_four_to_eight_bits(bits: int) -> None:
    prepared = ready(vision(), images(), {"*": f"int{bits}_weights"})
    for identity, _ in _weighted(prepared):
        assert int(prepared.weight_integers(identity, prepared.folded(identity)).abs().max()) == 2 ** (bits - 1) - 1


def test_a_classifier_of_stored_weights_in_a_static_recipe(tmp_path: Path) -> None:
    model, overrides = vision(), {"features.0.*": "float", "classifier": "int8_weight_only"}
    recipe = Recipe(overrides=overrides)
    artifact = lq.quantize(model, recipe, calibration_data=[images()], output_dir=tmp_path / "mixed", threads=1)
    rows = {row["name"]: row for row in artifact.report["plan"]["rows"]}
    actions = {name: rows[name]["action"] for name in ("features.0.0", "features.1", "classifier")}
    assert actions == {"features.0.0": "float", "features.1": "int8", "classifier": "int8 weights"}
    assert rows["classifier"]["macs"] == 8 * 128 * 64
    assert _agrees(artifact)
    assert artifact.report["still_float"] == {}
    tensors = onnx.load(artifact.model_path).graph.initializer
    assert [t.data_type for t in tensors if sorted(t.dims) == [64, 128]] == [onnx.TensorProto.INT8]
    # The weights alone are rounded: a float classifier on the same integer features is close.
    x, loaded = images(), lq.load(artifact.path, threads=1)
    closeness = {}
    for target in ("float", "int8_weight_only"):
        prepared = ready(model, x, {**overrides, "classifier": target})
        with torch.no_grad(), prepared.attached("frozen"):
            closeness[target] = model(x)
    assert signal_to_noise(closeness["int8_weight_only"], loaded(x)) > 60
    assert 35 < signal_to_noise(closeness["float"], closeness["int8_weight_only"]) < 60
    assert type(model.classifier) is nn.Linear


@pytest.mark.parametrize(
    ("target", "runtime"),
    [
        ("int4_weight_only", "onnxruntime"),
        ("int8_weight_only_gptq", "onnxruntime"),
        ("float16", "onnxruntime"),
    ],
)
@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_other_recipes_of_layers(tmp_path: Path, target: str, runtime: str) -> None:
    artifact = lq.quantize(
        vision(),
        Recipe(overrides={"classifier": target}),
        runtime,
        calibration_data=[images()],
        output_dir=tmp_path / "mixed",
        threads=1,
    )
    assert _agrees(artifact)
    expected = {"int4_weight_only": "int4 weights", "float16": "float16"}
    rows = {row["name"]: row["action"] for row in artifact.report["plan"]["rows"]}
    assert rows["classifier"] == expected.get(target, "int8 weights")


def test_stored_layers_beside_integer_ones_on_openvino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = Recipe(overrides={"classifier": "int8_weight_only"})
    artifact = lq.quantize(
        Vision().eval(), recipe, "openvino", calibration_data=[images()], output_dir=tmp_path, threads=1
    )
    assert _agrees(artifact)
    rows = {row["name"]: row["action"] for row in artifact.report["plan"]["rows"]}
    assert (rows["features.0.0"], rows["classifier"]) == ("int8", "int8 weights")


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_embeddings_and_recurrences_beside_integer_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    tokens = torch.randint(0, 500, (16, 6), generator=torch.Generator().manual_seed(2))
    sizes = {}
    for overrides in ({}, {"embedding": "float", "GRU": "float"}):
        recipe, folder = Recipe(overrides=overrides), tmp_path / str(len(overrides))
        artifact = lq.quantize(model, recipe, calibration_data=[tokens], output_dir=folder, threads=1)
        assert _agrees(artifact)
        sizes[len(overrides)] = artifact.size_bytes
        rows = {row["name"]: row["action"] for row in artifact.report["plan"]["rows"]}
        assert rows["head.0"] == "int8"
        expected = "float" if overrides else "int8 weights"
        assert (rows["embedding"], rows["recurrence"]) == (expected, expected)
    assert sizes[0] < sizes[2] - 2 * 500 * 32


@pytest.mark.filterwarnings(f"ignore::{NoEffectWarning.__module__}.{NoEffectWarning.__name__}")
def test_training_stores_the_weights_that_it_ended_with(tmp_path: Path) -> None:
    model, recipe = seeded(), Recipe(overrides={"head": "int8_weight_only"})
    callback = lq.QuantizationAwareTraining(recipe, module="net", output_dir=tmp_path / "artifact", threads=1)
    fit(model, callback, max_epochs=1, default_root_dir=tmp_path)
    assert callback.artifact is not None
    for row in callback.artifact.report["metrics"]:
        assert row["simulated"] == pytest.approx(row["artifact"], abs=1e-4)
    weight = model.net.head.weight.detach()
    expected = torch.round(weight / (weight.abs().amax(1, keepdim=True) / 127)).to(torch.int8)
    tensors = onnx.load(callback.artifact.model_path).graph.initializer
    stored = [onnx.numpy_helper.to_array(t) for t in tensors if sorted(t.dims) == sorted(weight.shape)]
    assert any(torch.equal(torch.tensor(array.T), expected) for array in stored if array.dtype == "int8")


def test_sensitivity_and_the_ladder_know_stored_layers() -> None:
    model, x = vision(), images(16)
    overrides = {"classifier": "int8_weight_only"}
    recipe = Recipe(overrides=overrides, accuracy_steps=("correct_outputs", "equalize", "choose_ranges"))
    prepared = prepare(model, (x,), recipe=recipe, observer="mse")
    calls = [((part,), {}) for part in x.split(4)]
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    assert "classifier" not in {layer.name for layer in sensitivity(prepared, calls).layers}
    check_agreement(prepared, convert(prepared), (x,), {})


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"`overrides` to hold patterns .* but got 'head'"):
        prepare(vision(), (images(),), recipe=Recipe(overrides={"head": "int4_weights"}))
    with pytest.raises(PlanError, match=r"but got 'head', which matches nothing"):
        prepare(vision(), (images(),), recipe=Recipe(overrides={"head": "int8_weight_only"}))
    for target in ("int1_weights", "fp8", "int8_dynamic"):
        with pytest.raises(QuantizationError, match=rf"map 'classifier' to 'float', .* but got '{target}'"):
            prepare(vision(), (images(),), recipe=Recipe(overrides={"classifier": target}))
    recipe = Recipe(overrides={"classifier": "int8_weight_only"})
    for runtime in ("inductor", "executorch"):
        with pytest.raises(PlanError, match=rf"for runtime '{runtime}' to name 'float' .* got \['int8_weight_only'\]"):
            prepare(vision(), (images(),), recipe=recipe, runtime=runtime)


def _agrees(artifact: lq.Artifact) -> bool:
    parity = artifact.report["parity"]
    return float(parity["artifact_db"]) >= float(parity["quantization_db"]) + 10 and parity["worst_share"] > 0.999


def _weighted(prepared: Prepared) -> list[tuple[str, Any]]:
    return [(identity, operator) for identity, operator in prepared.operators.items() if operator.weight]


class Shortcut(nn.Module):
    """Three convolutions, of which the second writes a term of a sum, and a linear layer behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.third(torch.relu(self.second(x) + x)).relu()
        return self.last(x.mean((2, 3)))


def test_ends_and_what_no_product_reads_keep_eight_bits() -> None:
    net, call = Shortcut().eval(), (torch.randn(2, 3, 8, 8),)
    prepared = prepare(net, call, recipe=get("int4"))
    grids = {identity.lstrip(":"): prepared.ranges.grid_of(identity).num_levels for identity in prepared.ranges.edges}
    read = {o.name: grids[o.reads[0].lstrip(":")] for o in prepared.operators.values() if o.weight}
    assert read == {"first": 256, "second": 16, "third": 16, "last": 256}
    assert grids["second"] == 256
    most = {o.name: prepared.weight_quant_max(i) for i, o in prepared.operators.items() if o.weight}
    assert most == {"first": 127, "second": 7, "third": 7, "last": 127}
    alike = prepare(net, call, recipe=get({"name": "int4", "wide_ends": False}))
    assert {alike.ranges.grid_of(identity).num_levels for identity in alike.ranges.edges} == {16}


def test_a_recipe_of_layers_has_other_schemes_where_overrides_say_so() -> None:
    model, call = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5))), (torch.randn(4, 64),)

    def actions(**overrides: str) -> dict[str, str]:
        plan = quantize_layers(model, call, recipe={"name": "int4_weight_only", "overrides": overrides}).plan
        # What stays float because the user wants it counts for no share that a recipe must store.
        assert plan.stored_share == 1.0
        return {row.name: row.action for row in plan.rows}

    said = {"0": "float", "2": "int8_weight_only", "3": "float16", "[2-4]": "int8_dynamic"}
    assert list(actions(**said).values()) == ["float", "int4 weights", "int8 weights", "float16", "int8 dynamic"]
    assert set(actions(Linear="int8_weight_only").values()) == {"int8 weights"}
    for overrides, message in (
        ({"5": "float"}, "matches nothing"),
        ({"5": "float16"}, "matches nothing"),
        ({"0": "int8"}, "int8_dynamic' or 'int8_weight_only'"),
        ({"0": "int4_weight_only_gptq"}, "'int4_weight_only'"),
    ):
        with pytest.raises(QuantizationError, match=message):
            actions(**overrides)
    with pytest.raises(QuantizationError, match="to be a dict"):
        get({"name": "int8_weight_only", "overrides": "float"})
    rows = {"name": "int8_weight_only", "overrides": {"0": "int8_dynamic"}}
    with pytest.raises(PlanError, match="'openvino' runs"):
        quantize_layers(model, call, recipe=rows, runtime="openvino")
