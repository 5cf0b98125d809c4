from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from exported import Artifacts, Made
from models import (
    CASES,
    DropPathNet,
    GroupedNet,
    ResidualNet,
    with_statistics,
)
from onnx.reference import ReferenceEvaluator
from reference_models import resnet18
from torch import Tensor, nn

from lightning_quant import load, runtimes
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import flatten_call
from lightning_quant.errors import ExportError, QuantizationError
from lightning_quant.export import convert as conversion
from lightning_quant.export.export import export, trial_export
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.runtimes import _onnx_export
from lightning_quant.simulate.parity import check_parity
from lightning_quant.simulate.prepared import Prepared

runtime = runtimes.get("onnxruntime")

EXPORTED = [case for case in CASES if case.exports]
IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def planned(prepared: Prepared) -> tuple[Any, ...]:
    return tuple(operator for graph in prepared.plan.graphs for operator in graph.operators)


def ready(model: nn.Module, *args: Tensor, **options: Any) -> Prepared:
    prepared = prepare(model.eval(), args, observer="min_max", **options)
    calibrate(prepared, steps_of(prepared, [args]))
    return prepared


class Exported:
    """The nets' artifacts for ONNX Runtime by name."""

    def __init__(self, made: Artifacts) -> None:
        self.made = made

    def __getitem__(self, name: str) -> Made:
        return self.made["onnxruntime", name]


@pytest.fixture(scope="session")
def exported(made: Artifacts) -> Exported:
    return Exported(made)


@pytest.fixture(params=[case.name for case in EXPORTED])
def item(request: pytest.FixtureRequest, exported: Exported) -> Made:
    return exported[request.param]


# --- what every artifact is, beyond the contract of all runtimes


def test_inputs_and_outputs_have_the_users_names(item: Made) -> None:
    graph = onnx.load(item.artifact.model_path).graph
    assert [info.name for info in graph.input] == list(item.prepared.spec.names)
    for info in graph.input:
        first = info.type.tensor_type.shape.dim[0]
        assert first.dim_param == "batch"
    expected = {
        "multi_modal": ["logits", "extras_fused", "extras_valid"],
        "nested": ["scores", "sides_0", "sides_1"],
    }
    assert [info.name for info in graph.output] == expected.get(item.case.name, ["output"])


def test_every_planned_integer_operator_is_one_in_the_session(item: Made) -> None:
    counts = runtime.count_operators(item.artifact.model_path)
    assert runtime.still_float(item.operators, counts) == {}
    kinds = Counter(operator.kind for operator in item.operators)
    assert counts.get("QLinearConv", 0) >= kinds["conv1d"] + kinds["conv2d"]
    assert counts.get("QGemm", 0) == kinds["linear"]
    assert counts.get("QLinearAdd", 0) == kinds["add"]


def test_parity_holds_for_every_operator(item: Made) -> None:
    args, kwargs = item.calls[2]
    _, tensors = flatten_call(item.prepared.signature, args, kwargs)
    loaded = load(item.artifact.path, threads=1)
    parity = check_parity(item.prepared, loaded, runtime, item.artifact.model_path, tensors)
    assert parity.failures == []
    assert parity.worst_operator in item.prepared.ranges.edges
    assert 0.999 <= parity.worst_share <= 1
    assert parity.artifact_db >= parity.quantization_db + 10
    if item.case.name in ("residual", "mlp"):
        assert parity.equal_argmax == 1.0
    if item.case.name in ("grouped", "nested"):
        assert parity.equal_argmax is None


def test_the_file_holds_no_float_copy_of_a_quantized_weight(item: Made) -> None:
    initializers = onnx.load(item.artifact.model_path).graph.initializer
    floats = sum(
        int(np.prod(i.dims)) for i in initializers if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) > 1
    )
    kept = {"decoder": 6 * 4 * 4, "multi_modal": 11 * 6}.get(item.case.name, 0)
    assert floats <= kept


# --- independent references


@pytest.mark.parametrize("name", ["mlp", "grouped", "residual", "pooling", "conv1d"])
def test_the_file_means_the_same_to_the_onnx_reference_and_without_optimizations(name: str, exported: Exported) -> None:
    item = exported[name]
    ((x,), _), simulated = item.calls[2], item.outputs(item.prepared.attached("frozen"))[2]
    named = {item.prepared.spec.names[0]: x.numpy()}
    (reference,) = ReferenceEvaluator(onnx.load(item.artifact.model_path)).run(None, named)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(item.artifact.model_path, options, providers=["CPUExecutionProvider"])
    (unfused,) = plain.run(None, named)
    floating = item.outputs()[2]
    for other in (reference, unfused):
        assert signal_to_noise(simulated, [torch.from_numpy(other)]) > signal_to_noise(floating, simulated) + 10


# --- calls


def test_keyword_only_arguments_and_dataclass_results(exported: Exported) -> None:
    item = exported["multi_modal"]
    model = load(item.artifact.path, threads=1)
    _, kwargs = item.calls[1]
    result = model(**kwargs)
    (logits, fused, valid) = item.outputs(item.prepared.attached("frozen"))[1]
    torch.testing.assert_close(result.logits, logits)
    torch.testing.assert_close(result["extras"]["fused"], fused)
    assert torch.equal(result.extras["valid"], valid)
    assert torch.equal(result.logits, model(**kwargs, scaled=False).logits)
    with pytest.raises(QuantizationError, match="Expected a call that fits"):
        model(kwargs["image"], kwargs["tokens"], kwargs["mask"])


def test_token_ids_and_masks_are_not_quantized(exported: Exported) -> None:
    item = exported["multi_modal"]
    graph = onnx.load(item.artifact.model_path).graph
    types = {info.name: info.type.tensor_type.elem_type for info in graph.input}
    assert types["tokens"] == onnx.TensorProto.INT64
    assert types["mask"] == onnx.TensorProto.BOOL
    readers = {node.op_type for node in graph.node if {"tokens", "mask"} & set(node.input)}
    assert "QuantizeLinear" not in readers
    assert not {":tokens", ":mask"} & set(item.prepared.ranges.edges)


def test_other_constants_than_the_captured_ones_are_refused(exported: Exported) -> None:
    item = exported["multi_modal"]
    with pytest.raises(QuantizationError, match=r"constants of the captured call.*part of the exported model"):
        load(item.artifact.path, threads=1)(**item.calls[0][1], scaled=True)


@pytest.mark.parametrize("shape", [(4, 3, 8, 9), (4, 1, 8, 8), (3, 8, 8), (4, 3, 8, 8, 1)])
def test_other_shapes_than_the_captured_ones_are_refused(shape: tuple[int, ...], exported: Exported) -> None:
    model = load(exported["residual"].artifact.path, threads=1)
    with pytest.raises(QuantizationError, match=r"Expected `image` to have shape \('batch', 3, 8, 8\), but got"):
        model(torch.randn(shape))


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((IMAGE, IMAGE), {}), ((), {"picture": IMAGE})])
def test_calls_that_do_not_fit_the_signature_are_refused(
    args: tuple[Tensor, ...], kwargs: dict[str, Tensor], exported: Exported
) -> None:
    model = load(exported["residual"].artifact.path, threads=1)
    with pytest.raises(QuantizationError, match="Expected a call that fits `forward"):
        model(*args, **kwargs)


def test_missing_tensors_of_a_nested_argument_are_refused(exported: Exported) -> None:
    item = exported["nested"]
    model = load(item.artifact.path, threads=1)
    (batch,), kwargs = item.calls[0]
    with pytest.raises(QuantizationError, match=r"batch_a.*batch_b"):
        model({"a": batch["a"]}, **kwargs)


def test_inputs_of_another_precision_are_taken_in_the_captured_one(exported: Exported) -> None:
    model = load(exported["residual"].artifact.path, threads=1)
    expected = model(IMAGE)
    assert torch.equal(model(IMAGE.double()), expected)
    assert torch.equal(model(IMAGE.requires_grad_()), expected)
    IMAGE.requires_grad_(False)
    assert torch.equal(model(IMAGE.flip(0)), expected.flip(0))


def test_threads_and_providers_are_passed_on(exported: Exported) -> None:
    path = exported["mlp"].artifact.path
    model = load(path, threads=2, providers=["CPUExecutionProvider"])
    assert model.session.get_session_options().intra_op_num_threads == 2
    assert model.session.get_providers() == ["CPUExecutionProvider"]


# --- operators


def test_an_operator_that_was_planned_and_is_missing_is_reported(exported: Exported) -> None:
    item = exported["residual"]
    counts = runtime.count_operators(item.artifact.model_path)
    assert runtime.still_float(item.operators * 2, counts) == {
        "conv2d": 3,
        "add": 1,
        "global_avg_pool": 1,
        "linear": 1,
    }
    assert runtime.still_float(item.operators, {**counts, "QLinearConv": 2}) == {"conv2d": 1}
    assert runtime.still_float(item.operators, {}) == dict(Counter(operator.kind for operator in item.operators))


def test_a_tensor_left_in_float_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    insert = conversion._insert_pair

    def insert_elsewhere(graph: Any, node: Any, *grid: Any) -> None:
        if node.meta["key"] != "relu":
            insert(graph, node, *grid)

    monkeypatch.setattr(conversion, "_insert_pair", insert_elsewhere)
    monkeypatch.setattr(conversion, "_drop", lambda node: None)
    prepared = ready(GroupedNet(), torch.randn(4, 4, 8, 8))
    operators = planned(prepared)
    artifact = export(prepared, tmp_path)
    missing = runtime.still_float(operators, runtime.count_operators(artifact.model_path))
    assert missing == {"conv2d": 2}


def test_a_mean_left_as_it_is_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_pool_with_static_window", lambda node: None)
    monkeypatch.setattr(_onnx_export, "_pool_globally", lambda model: None)
    prepared = ready(with_statistics(DropPathNet()), IMAGE)
    artifact = export(prepared, tmp_path)
    missing = runtime.still_float(planned(prepared), runtime.count_operators(artifact.model_path))
    assert missing == {"global_avg_pool": 1}


def test_parity_fails_for_another_models_artifact(exported: Exported) -> None:
    item = exported["residual"]
    other = item.case.build()
    with torch.no_grad():
        other.conv2.weight.mul_(-1.0)
    loaded = load(item.artifact.path, threads=1)
    parity = check_parity(item.prepared.bound_to(other), loaded, runtime, item.artifact.model_path, [IMAGE])
    assert parity.worst_operator == ":bn2"
    assert any("only" in failure and ":bn2" in failure for failure in parity.failures)
    assert any("from its simulation" in failure for failure in parity.failures)


def test_parity_needs_a_file_with_the_same_edges(exported: Exported) -> None:
    item = exported["residual"]
    with pytest.raises(ExportError, match="quantized tensors of the plan in the exported file"):
        runtime.run_forced(item.artifact.model_path, {"image": IMAGE}, {"other": np.zeros((4, 3, 8, 8), np.uint8)})


class Excluding(nn.Module):
    """A convolution between two others that stays float when it is excluded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(F.relu(self.first(x)))))


def excluded_counts(folder: Path) -> tuple[Prepared, dict[str, int]]:
    prepared = ready(Excluding(), IMAGE, selection=Selection(exclude=("middle",)))
    return prepared, runtime.count_operators(export(prepared, folder).model_path)


def test_an_excluded_layer_runs_in_float(tmp_path: Path) -> None:
    prepared, counts = excluded_counts(tmp_path)
    assert counts["QLinearConv"] == 2
    assert sum(counts.get(name, 0) for name in ("Conv", "FusedConv")) == 1
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = prepared.root(IMAGE)
    assert signal_to_noise(simulated, load(tmp_path, threads=1)(IMAGE)) > 50


def test_unshielded_the_runtime_quantizes_an_excluded_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair of the test above: ONNX Runtime quantizes weights between quantized tensors unasked."""
    monkeypatch.setattr(conversion, "shield_float_layers", lambda *_: None)
    _, counts = excluded_counts(tmp_path)
    assert counts["QLinearConv"] == 3


def test_a_convolution_that_only_pads_is_an_integer_convolution(exported: Exported) -> None:
    counts = runtime.count_operators(exported["padded"].artifact.model_path)
    assert counts["QLinearConv"] == 2
    assert not {"Conv", "FusedConv", "Pad"} & set(counts)


ENDINGS = {
    "relu": nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
    "relu6": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU6()),
    "relu, then float": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Softmax(-1)),
    "gelu between": nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)),
    "layer norm between": nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)),
    "dropout between": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3), nn.ReLU()),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_linear_layers_are_integer_operators_whatever_follows(ending: str, tmp_path: Path) -> None:
    model = with_statistics(ENDINGS[ending])
    x = torch.randn(16, 6)
    prepared = ready(model, x)
    artifact = export(prepared, tmp_path)
    counts = runtime.count_operators(artifact.model_path)
    assert runtime.still_float(planned(prepared), counts) == {}
    assert counts["QGemm"] == sum(isinstance(module, nn.Linear) for module in model)
    loaded = load(tmp_path, threads=1)
    parity = check_parity(prepared, loaded, runtime, artifact.model_path, [x])
    assert parity.failures == []


def test_a_convolution_at_the_end_is_an_integer_operator(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 1), nn.Sigmoid()).eval()
    prepared = ready(model, IMAGE)
    counts = runtime.count_operators(export(prepared, tmp_path).model_path)
    assert counts["QLinearConv"] == 2
    assert runtime.still_float(planned(prepared), counts) == {}


def test_matrix_products_of_tensors_are_integer_operators(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5, -1)
            return self.out(scores @ self.value(x))

    model, x = Attention().eval(), torch.randn(4, 5, 8)
    prepared = ready(model, x)
    artifact = export(prepared, tmp_path)
    counts = runtime.count_operators(artifact.model_path)
    assert runtime.still_float(planned(prepared), counts) == {}
    assert counts["QGemm"] == 4
    loaded = load(tmp_path, threads=1)
    with torch.no_grad(), prepared.attached("frozen"):
        assert signal_to_noise(model(x), loaded(x)) > 30
    assert loaded(torch.randn(2, 5, 8)).shape == (2, 5, 8)


def test_resnet18_runs_in_integers_from_end_to_end(tmp_path: Path) -> None:
    prepared = ready(resnet18(num_classes=10), torch.randn(2, 3, 32, 32))
    counts = runtime.count_operators(export(prepared, tmp_path).model_path)
    expected = {"QLinearConv": 20, "QLinearAdd": 8, "QGemm": 1}
    assert {name: counts[name] for name in expected} == expected
    assert counts.get("QuantizeLinear", 0) <= 2
    assert counts.get("DequantizeLinear", 0) <= 2
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "BatchNormalization"} & set(counts)


# --- sizes


def test_dimensions_that_varied_while_calibrating_are_dynamic(tmp_path: Path) -> None:
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [IMAGE, torch.randn(2, 3, 12, 10)]))
    export(prepared, tmp_path)
    loaded = load(tmp_path, threads=1)
    for size in ((8, 8), (12, 10), (9, 16)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            floating = model(x)
            with prepared.attached("frozen"):
                simulated = model(x)
        actual = loaded(x)
        assert actual.shape == floating.shape
        assert signal_to_noise(simulated, actual) > 30


class Pooled(nn.Module):
    """A convolution and its mean over all places, spelled in some way."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.conv, self.head, self.pool = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x)).flatten(1))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=[-1, -2], keepdim=True),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.flatten(2).mean(-1),
    ],
)
def test_a_mean_over_all_places_is_an_integer_operator_for_any_size(pool: Any, tmp_path: Path) -> None:
    prepared = ready(Pooled(pool), IMAGE)
    artifact = export(prepared, tmp_path, dynamic_shapes={"x": {2: "height", 3: "width"}})
    counts = runtime.count_operators(artifact.model_path)
    assert counts["QLinearGlobalAveragePool"] == 1
    assert runtime.still_float(planned(prepared), counts) == {}
    x = torch.randn(3, 3, 11, 7)
    with torch.no_grad(), prepared.attached("frozen"):
        assert signal_to_noise(prepared.root(x), load(tmp_path, threads=1)(x)) > 50


def test_dimensions_may_be_chosen_as_dynamic(tmp_path: Path) -> None:
    prepared = ready(GroupedNet(), torch.randn(4, 4, 8, 8))
    export(prepared, tmp_path, dynamic_shapes={"image": {2: "height", 3: "width"}})
    loaded = load(tmp_path, threads=1)
    x = torch.randn(3, 4, 11, 7)
    with torch.no_grad(), prepared.attached("frozen"):
        assert signal_to_noise(prepared.root(x), loaded(x)) > 50
    assert loaded.signature.inputs[0].shape == ("batch", 4, "height", "width")


@pytest.mark.parametrize("chosen", [{"picture": {2: "height"}}, {"image": {4: "depth"}}])
def test_dynamic_dimensions_that_do_not_exist_are_refused(chosen: dict[str, dict[int, str]], tmp_path: Path) -> None:
    prepared = ready(GroupedNet(), torch.randn(4, 4, 8, 8))
    with pytest.raises(QuantizationError, match=r"`dynamic_shapes`.*'image': \(4, 4, 8, 8\)"):
        export(prepared, tmp_path, dynamic_shapes=chosen)


def test_a_captured_batch_of_one_still_exports_a_dynamic_batch(tmp_path: Path) -> None:
    prepared = ready(with_statistics(ResidualNet()), IMAGE[:1])
    export(prepared, tmp_path)
    loaded = load(tmp_path, threads=1)
    with torch.no_grad(), prepared.attached("frozen"):
        assert signal_to_noise(prepared.root(IMAGE), loaded(IMAGE)) > 30


# --- precisions and names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_trained_in_another_precision_exports(dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_statistics(ResidualNet()).eval()
    with torch.no_grad():
        expected = model(IMAGE)
    prepared = ready(model.to(dtype), IMAGE.to(dtype))
    counts = runtime.count_operators(export(prepared, tmp_path).model_path)
    assert runtime.still_float(planned(prepared), counts) == {}
    loaded = load(tmp_path, threads=1)
    for image in (IMAGE, IMAGE.to(dtype)):
        assert signal_to_noise(expected, loaded(image)) > 15
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_results_may_be_named_like_arguments(tmp_path: Path) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(6, 3), nn.Linear(3, 6)

        def forward(self, output: Tensor, image: Tensor) -> dict[str, Tensor]:
            code = self.encode(image)
            return {"image": self.decode(code), "output": output, "code": code, "same": code, "relu": F.relu(code)}

    model, x = Autoencoder().eval(), torch.randn(8, 6)
    prepared = ready(model, x, x)
    export(prepared, tmp_path)
    loaded = load(tmp_path, threads=1)
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = model(x, x)
    result = loaded(x, image=x)
    assert list(result) == list(simulated)
    for name in simulated:
        torch.testing.assert_close(result[name], simulated[name], atol=1e-5, rtol=0)


def test_arguments_that_change_nothing_are_still_accepted(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor, unused: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.fc(x)

    prepared = ready(Net(), torch.randn(8, 6), torch.randn(8, 2))
    export(prepared, tmp_path)
    loaded = load(tmp_path, threads=1)
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x, torch.randn(3, 2)), loaded(x, unused=torch.zeros(3, 2), labels=None))


# --- refusals


class Counting(ResidualNet):
    """Reads all of its values, one by one."""

    def forward(self, image: Tensor) -> Tensor:
        scores = super().forward(image)
        return scores * sum(value > 0 for value in scores.flatten().tolist())


def test_a_forward_that_depends_on_values_is_refused_in_few_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared = ready(with_statistics(Counting()), IMAGE)
    with pytest.raises(ExportError, match=r"data-dependent.*module=") as refusal:
        trial_export(prepared)
    with pytest.raises(ExportError, match="PyTorch's exporter to ONNX to take the module"):
        export(prepared, tmp_path / "out")
    assert len(str(refusal.value)) < 500
    assert not list((tmp_path / "out").glob("*"))
    captured = capfd.readouterr()
    assert len((captured.out + captured.err).splitlines()) < 5


def test_a_trial_export_needs_no_ranges_and_leaves_none_behind() -> None:
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,))
    trial_export(prepared)
    assert all(observer.low is None for observer in prepared.ranges.observers.values())
    assert "forward" not in vars(model)
    assert prepared.phase == "off"


@pytest.mark.parametrize(
    "last",
    [
        "lightning_quant.artifact.golden.save",
        "lightning_quant.artifact.artifact.write",
        "lightning_quant.export.export._describe",
    ],
)
def test_a_trial_export_writes_all_that_the_end_writes(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise QuantizationError("not possible here")

    monkeypatch.setattr(last, fail)
    with pytest.raises(QuantizationError, match="not possible here"):
        trial_export(prepare(with_statistics(ResidualNet()).eval(), (IMAGE,)))


def test_a_file_that_the_runtime_cannot_run_is_refused(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Unheard", ["x"], ["y"], domain="nobody")
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "broken", [info], [output])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("nobody", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match=r"Expected ONNX Runtime to run the exported model.*Unheard"):
        runtime.check(tmp_path / "broken.onnx")
