"""What `load` returns, for every runtime: its copies and pickles, calls from threads, and calls that do not fit."""

import copy
import multiprocessing
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import Artifacts, Made
from torch import Tensor, nn

from lightning_quant import load, runtimes
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.errors import ArtifactError, QuantizationError


@pytest.fixture(params=runtimes.names())
def item(request: pytest.FixtureRequest, made: Artifacts) -> Made:
    return made[request.param, "multi_modal"]


@pytest.fixture
def model(item: Made) -> LoadedModule:
    return load(item.artifact.path)


def outputs(model: Any, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return tensor_leaves(model(*call[0], **call[1]))


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- copies


def test_copies_answer_alike_and_are_modules_of_their_own(item: Made, model: LoadedModule) -> None:
    expected = outputs(model, item.calls[1])
    for duplicate in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(duplicate) is type(model)
        assert equal(outputs(duplicate, item.calls[1]), expected)
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(lambda *_: None)
    hooked.train()
    assert not model._forward_hooks
    assert hooked.training != model.eval().training


def test_a_parent_with_a_loaded_child_is_copied_and_pickled(item: Made, model: LoadedModule) -> None:
    parent = nn.ModuleDict({"net": model, "same": model, "head": nn.Linear(2, 2)})
    for duplicate in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert duplicate["net"] is duplicate["same"]
        assert equal(outputs(duplicate["net"], item.calls[0]), outputs(model, item.calls[0]))


def test_code_that_asks_for_a_device_finds_one_and_state_dicts_hold_nothing(model: LoadedModule) -> None:
    assert next(model.parameters()).device == model.device == torch.device("cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    assert model.state_dict() == {}
    parent = nn.Sequential(nn.Linear(2, 2), model)
    assert set(parent.state_dict()) == {"0.weight", "0.bias"}
    parent.load_state_dict(parent.state_dict())
    assert model.to("meta").device == torch.device("meta")


def answers(model: Any, call: Any, queue: Any) -> None:
    queue.put([tensor.tolist() for tensor in outputs(model, call)])


def test_a_spawned_process_gets_the_module_by_its_path(made: Artifacts) -> None:
    item = made["onnxruntime", "multi_modal"]
    model: Any = load(item.artifact.path, threads=1)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answers, args=(model, item.calls[0], queue))
    process.start()
    found = queue.get(timeout=800)
    process.join()
    assert found == [tensor.tolist() for tensor in outputs(model, item.calls[0])]


def test_options_are_kept_and_another_artifact_in_its_place_is_noticed(made: Artifacts, tmp_path: Path) -> None:
    shutil.copytree(made["onnxruntime", "multi_modal"].artifact.path, tmp_path / "a")
    model: Any = load(tmp_path / "a", threads=1)
    pickled = pickle.dumps(model)
    assert pickle.loads(pickled).session.get_session_options().intra_op_num_threads == 1
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ArtifactError, match="to hold an artifact"):
        pickle.loads(pickled)
    shutil.copytree(made["onnxruntime", "mlp"].artifact.path, tmp_path / "a")
    with pytest.raises(ArtifactError, match="its model has changed since"):
        pickle.loads(pickled)


def test_a_module_that_was_not_loaded_says_that_it_cannot_be_pickled(made: Artifacts) -> None:
    artifact = made["onnxruntime", "multi_modal"].artifact
    model = runtimes.get("onnxruntime").load(
        artifact.model_path.parent, {"model": artifact.model_path.name}, artifact.signature
    )
    with pytest.raises(QuantizationError, match="a module that `load` returned"):
        pickle.dumps(model)


# --- threads


def test_threads_get_the_results_of_their_own_inputs(item: Made, model: LoadedModule) -> None:
    calls = [item.case.call(4) for _ in range(8)]
    expected = [outputs(model, call) for call in calls]
    wrong: list[Any] = []

    def work(index: int) -> None:
        try:
            wrong.extend(index for _ in range(40) if not equal(outputs(model, calls[index]), expected[index]))
        except QuantizationError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- calls that do not fit


def changed(item: Made, change: Any, place: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call whose tensor at a place of the signature is changed."""
    name = item.artifact.signature.inputs[place].name
    args, kwargs = item.calls[1]
    names = [parameter[0] for parameter in item.artifact.signature.parameters]
    every = dict(zip(names, args, strict=False)) | kwargs
    return (), {**every, name: change(every[name])}


KINDS = {
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "quantized": lambda x: torch._make_per_tensor_quantized_tensor(x.to(torch.uint8), 1.0, 0),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_kinds_are_refused(kind: str, item: Made, model: LoadedModule) -> None:
    with pytest.raises(QuantizationError, match="Expected `image` to be"):
        outputs(model, changed(item, KINDS[kind]))


def test_batches_of_unequal_sizes_are_refused(item: Made, model: LoadedModule) -> None:
    for place in (0, 1):
        with pytest.raises(QuantizationError, match=r"to have one size along 'batch'.* but got (3 and 1|1 and 3)"):
            outputs(model, changed(item, lambda x: x[:1], place))


def test_values_that_survive_are_taken_in_other_types_and_others_are_refused(item: Made, model: LoadedModule) -> None:
    call = item.calls[1]
    tensors = {info.name: info.dtype for info in item.artifact.signature.inputs}
    assert tensors["image"] == "float32"
    wide = changed(item, lambda x: x.double())
    assert [t.shape for t in outputs(model, wide)] == [t.shape for t in outputs(model, call)]
    integers = changed(item, lambda x: x.round().to(torch.int64))
    floats = ((), {**integers[1], "image": integers[1]["image"].float()})
    assert equal(outputs(model, integers), outputs(model, floats))
    with pytest.raises(QuantizationError, match="int64 with values that float32 does not have"):
        outputs(model, changed(item, lambda x: torch.full(x.shape, 2**24 + 1)))
    assert equal(outputs(model, changed(item, lambda x: x.float(), 1)), outputs(model, changed(item, lambda x: x, 1)))
    with pytest.raises(QuantizationError, match="`tokens` to be int64, but got float32 with values"):
        outputs(model, changed(item, lambda x: x + 0.5, 1))
    with pytest.raises(QuantizationError, match="`mask` to be bool, but got int64 with values"):
        outputs(model, changed(item, lambda x: 2 * x.long(), 2))
