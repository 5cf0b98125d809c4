"""What every runtime owes: the same tests over all of them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import lightning_models
import pytest
import torch
from exported import Artifacts, Made, results_of_a_fresh_process
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import CASES
from quick_exports import export_anew
from torch import Tensor, nn

from lightning_quant import PostTrainingQuantization, load, runtimes, verify
from lightning_quant.artifact.artifact import add_report, read
from lightning_quant.calls.calls import flatten_call
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.errors import ArtifactError, MissingRuntimeError, QuantizationError
from lightning_quant.export.export import export
from lightning_quant.machine.latency import Timing
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe import recipe as recipes
from lightning_quant.recipe.recipe import LayerRecipe
from lightning_quant.report import make_report as measuring
from lightning_quant.simulate.parity import Parity, check_parity
from lightning_quant.simulate.ties import NUM_DRAWS

RUNTIMES = tuple(runtimes.names())
NETS = ("residual", "mlp", "multi_modal", "nested", "pooling")
# Compiling takes a quarter of a minute for each net; ONNX Runtime's engine, the default, is asked all of them.
OTHER_NETS = {
    "inductor": ("residual", "multi_modal"),
    "onnxruntime": tuple(case.name for case in CASES if case.exports),
}
PAIRS = [(runtime, net) for runtime in RUNTIMES for net in OTHER_NETS.get(runtime, NETS)]


@pytest.fixture(scope="session")
def fresh_results(request: pytest.FixtureRequest, made: Artifacts) -> dict[str, list[list[Tensor]]]:
    """What one fresh process gets from the artifacts that this run asks for."""
    asked = [test.callspec.params["item"] for test in request.session.items if "fresh_results" in test.fixturenames]
    return results_of_a_fresh_process(made, asked)


@pytest.fixture(params=PAIRS, ids="-".join)
def item(request: pytest.FixtureRequest, made: Artifacts) -> Made:
    return made[request.param]


def test_loaded_artifact_is_called_like_the_module(item: Made) -> None:
    model = load(item.artifact.path, threads=1)
    assert isinstance(model, LoadedModule)
    (args, kwargs) = item.calls[1]
    with torch.no_grad():
        expected = item.prepared.root(*args, **kwargs)
    # A Trainer sets the mode of all modules around validation.
    assert model.train().training
    assert not model.eval().training
    result = model(*args, **kwargs)
    if isinstance(expected, dict | tuple):
        assert type(result) is type(expected)
    # Positional arguments may also be given by name.
    by_name = dict(zip(item.prepared.signature.parameters, args, strict=False)) | kwargs
    for first, second in zip(tensor_leaves(result), tensor_leaves(model(**by_name)), strict=True):
        assert torch.equal(first, second)
    with pytest.raises(QuantizationError, match="Expected a call that fits `forward"):
        model(*args, **kwargs, surprise=1)


def test_signature_names_inputs_and_outputs(item: Made) -> None:
    signature = read(item.artifact.path).signature

    assert [info.name for info in signature.inputs] == list(item.prepared.spec.names)
    assert all(info.shape[0] == "batch" for info in signature.inputs)
    assert len({info.name for info in signature.outputs}) == len(signature.outputs) > 0


def test_size_is_bytes_on_disk(item: Made) -> None:
    beside = ("manifest.json", "golden.safetensors", "report.md", "report.json")
    files = [path for path in item.artifact.path.iterdir() if path.name not in beside]

    assert files
    assert item.artifact.size_bytes == sum(path.stat().st_size for path in files)


def test_every_planned_integer_operator_is_one_in_the_engine(item: Made) -> None:
    counts = item.runtime.count_operators(item.artifact.model_path)

    assert item.operators
    assert item.runtime.still_float(item.operators, counts) == {}
    kinds = {operator.kind for operator in item.operators} & {"conv1d", "conv2d", "linear"}
    assert set(item.runtime.still_float(item.operators, {})) >= kinds


def test_parity_holds(item: Made) -> None:
    args, kwargs = item.calls[2]
    _, tensors = flatten_call(item.prepared.signature, args, kwargs)
    loaded = load(item.artifact.path, threads=1)
    parity = check_parity(item.prepared, loaded, item.runtime, item.artifact.model_path, tensors)

    assert parity.failures == []
    assert (parity.worst_share is not None) == item.runtime.KEEPS_EDGES
    if parity.worst_share is not None:
        assert parity.worst_operator in item.prepared.ranges.edges
        assert 0.999 <= parity.worst_share <= 1


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_report_is_made_of_every_runtime(runtime: str, made: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(contestants: dict[str, Any], **_: Any) -> dict[str, Timing]:
        for call in contestants.values():
            call()
        return dict.fromkeys(contestants, Timing(1.0, 1.0, 1.0, 1))

    monkeypatch.setattr(measuring, "measure", once)
    item = made[runtime, "residual"]
    report = measuring.make_report(item.prepared, item.artifact, threads=1).to_dict()

    assert report["parity"] is not None
    assert report["still_float"] == {}
    assert [row["batch"] for row in report["latency"]] == [1, 4]
    assert all((row["runtime_float"] is None) == item.runtime.IN_PROCESS for row in report["latency"])
    assert not any("has no peer" in note for note in report["notes"])


def test_golden_batch_gives_the_same_here(item: Made) -> None:
    assert verify(item.artifact.path).failures == []


def test_report_ends_with_lines_that_do_not_need_this_package(item: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(item.artifact.path, tmp_path / "copy"))
    artifact = add_report(read(folder), {}, "# Report")
    assert artifact.report_path is not None
    code = artifact.report_path.read_text().rpartition("```python\n")[2].removesuffix("```\n")

    # Where a program has layers of stored weights, it imports their operators, on a condition.
    assert not re.search(r"^(import|from) lightning_quant", code, re.MULTILINE)
    compile(code, "report.md", "exec")


def test_file_names_no_path_of_this_machine(item: Made) -> None:
    if item.prepared.plan.runtime == "inductor":
        pytest.skip("Inductor's generated code names the folder of its cache")
    for name in item.artifact.model_files.values():
        content = (item.artifact.path / name).read_bytes()
        for path in (Path(__file__).parent, Path.home(), item.artifact.path):
            assert str(path).encode() not in content


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_same_model_again_is_the_same_file(runtime: str, made: Artifacts, tmp_path: Path) -> None:
    item = made[runtime, "residual"]
    export_anew()
    hashes = [artifact.manifest["sha256"] for artifact in (item.artifact, export(item.prepared, tmp_path))]
    names = item.artifact.model_files.values()

    assert names
    assert all(hashes[0][name] == hashes[1][name] for name in names)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_model_of_another_format_with_right_hashes_is_refused(runtime: str, made: Artifacts) -> None:
    item = made[runtime, "residual"]
    folder = item.artifact.path.parent / f"broken-{runtime}"
    folder.mkdir()
    for name in item.artifact.model_files.values():
        path = folder / Path(name).name
        path.write_bytes(b"no model at all")
    files = {role: Path(name).name for role, name in item.artifact.model_files.items()}
    with pytest.raises(ArtifactError, match="Expected"):
        item.runtime.load(folder, files, item.artifact.signature)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_signature_of_another_model_is_refused(runtime: str, made: Artifacts) -> None:
    item, other = made[runtime, "multi_modal"], made[runtime, "residual"]
    with pytest.raises(ArtifactError, match="inputs and outputs of its signature"):
        item.runtime.load(item.artifact.path, item.artifact.model_files, other.artifact.signature)


class _NoBatchError(Exception):
    """Training began."""


class _NoTraining(Callback):
    def on_train_batch_start(self, *args: Any) -> None:
        raise _NoBatchError


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_missing_engine_is_refused_before_training(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    package = runtimes.get(runtime).REQUIRES[0]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == package else find_spec(n, *rest))
    with pytest.raises(MissingRuntimeError, match=rf"{package}.* is missing: pip install "):
        runtimes.get(runtime)
    callback = PostTrainingQuantization(runtime=runtime, output_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match="pip install"):
        lightning_models.fit(lightning_models.Classifier(), callback, _NoTraining())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_cannot_be_exported_is_refused_before_training(runtime: str, tmp_path: Path) -> None:
    class Counting(nn.Module):
        """Reads a value of each image, one by one."""

        def __init__(self) -> None:
            super().__init__()
            self.net = lightning_models.ConvNet()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * sum(value > 0 for value in x[:, 0, 0, 0].tolist())

    callback = PostTrainingQuantization(runtime=runtime, output_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"Name a child module|module="):
        lightning_models.fit(lightning_models.Classifier(Counting()), callback, _NoTraining())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["int8_dynamic", "int8_weight_only", "int4_weight_only", "float16"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_recipe_of_layers_trains_on_only_where_the_runtime_has_it(runtime: str, recipe: str, tmp_path: Path) -> None:
    layers = recipes.get(recipe)
    assert isinstance(layers, LayerRecipe)
    runs = runtimes.get(runtime).runs_layers(layers.schemes)
    callback = PostTrainingQuantization(recipe, runtime, output_dir=tmp_path)
    outcome, way_out = (_NoBatchError, None) if runs else (MisconfigurationException, r"\. Use ")
    with pytest.raises(outcome, match=way_out):
        lightning_models.fit(lightning_models.Classifier(), callback, _NoTraining())


def test_manifest_says_which_engine_wrote_it(item: Made) -> None:
    manifest = json.loads((item.artifact.path / "manifest.json").read_text())

    assert set(item.runtime.REQUIRES) <= set(manifest["versions"])
    assert manifest["runtime"] == item.prepared.plan.runtime


# Last, when every artifact is there.


def test_fresh_process_gets_the_simulated_results_at_every_batch_size(
    item: Made, fresh_results: dict[str, list[list[Tensor]]]
) -> None:
    loaded = fresh_results[item.artifact.path.name]
    floating, simulated = item.outputs(), item.outputs(item.prepared.attached("frozen"))
    draws = range(NUM_DRAWS)
    tipped = [item.outputs(item.prepared.attached("frozen"), item.prepared.simulation.jittering(d)) for d in draws]
    for expected, actual in zip(floating, loaded, strict=True):
        assert [leaf.shape for leaf in actual] == [leaf.shape for leaf in expected]
        assert [leaf.dtype for leaf in actual] == [leaf.dtype for leaf in expected]
    # Over all batches, since a single sample's rounding may cancel by chance.
    noise = signal_to_noise(floating, simulated), signal_to_noise(simulated, loaded)
    assert Parity("", None, *noise, None, tuple(signal_to_noise(simulated, t) for t in tipped)).failures == []
