"""Programs of the runtime `torch` call a closed list of operators: what a file says decides values, no more."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_nets import net
from torch import Tensor, nn

from lightning_quant import runtimes
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import ArtifactError, QuantizationError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.planned.layerwise import quantize_layers

runtime = runtimes.get("torch")

X = torch.randn(3, 6)
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module", params=["static", "layers"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    if request.param == "static":
        model = net()
        quantized: Any = prepare(model, (X,), recipe="int8", runtime="torch", observer="min_max")
        calibrate(quantized, steps_of(quantized, [X]))
    else:
        quantized = quantize_layers(net(), (X,), recipe="int8_weight_only", runtime="torch")
    return export(quantized, tmp_path_factory.mktemp(request.param) / "artifact")


def load_changed(artifact: Artifact, folder: Path, change: Change) -> Any:
    """Load an artifact's model with another program, past all hashes, as somebody who makes artifacts could."""
    files = {role: Path(name).name for role, name in artifact.model_files.items()}
    for name in files.values():
        shutil.copy(artifact.model_path.parent / name, folder / name)
    path = folder / next(name for name in files.values() if name.endswith(".json.gz"))
    program = json.loads(gzip.decompress(path.read_bytes()))
    change(program)
    path.write_bytes(gzip.compress(json.dumps(program).encode()))
    return runtime.load(folder, files, artifact.signature)


def before_all(call: str, *args: Any, **kwargs: Any) -> Change:
    """Put a step in front."""

    def change(program: dict[str, Any]) -> None:
        program["steps"].insert(0, {"name": "step.new", "call": call, "args": list(args), "kwargs": kwargs})

    return change


FOREIGN = {
    "opens a file": before_all("aten.from_file.default", "victim", True, 4),
    "writes what it is given": before_all("aten.fill_.Scalar", {"value": "input"}, 0.0),
    "writes into an output": before_all("aten.add.out", {"value": "input"}, {"value": "input"}, out={"value": "input"}),
    "takes another's memory": before_all("aten.set_.source_Tensor", {"value": "input"}, {"value": "input"}),
    "shows memory that nobody filled": before_all("aten.empty.memory_format", [4]),
    "prints": before_all("aten._print.default", "text"),
    "is Python's": before_all("operator.attrgetter", "system"),
    "is a module's": before_all("os.system", "true"),
    "is an attribute of torch": before_all("torch.load", "victim"),
    "is an attribute of an operator": before_all("aten.relu.__class__"),
    "is no text": before_all(7),  # type: ignore[arg-type]
    "names a constant that is none": before_all("aten.zeros.default", [1], dtype={"torch": "_inductor"}),
    "names another device": before_all("aten.zeros.default", [1], device="meta"),
    "is called like another value": lambda program: program["steps"].append(program["steps"][0]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_in_the_list_is_refused_when_it_is_loaded(name: str, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="to be a program"):
        load_changed(artifact, tmp_path, FOREIGN[name])
    assert (tmp_path / "victim").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "step",
    [
        ("operator.mul", "a", 2**40),
        ("operator.mul", [0], 2**40),
        ("operator.mod", "%1000000000d", 1),
        ("operator.mul", 2**62, 2**62),
        ("operator.add", [0], [0]),
        ("operator.getitem", "text", 0),
        ("operator.floordiv", 1, 0),
        ("math.ceil", {"value": "input"}),
    ],
    ids=lambda step: step[0],
)
def test_arithmetic_is_of_numbers(step: tuple[Any, ...], artifact: Artifact, tmp_path: Path) -> None:
    model = load_changed(artifact, tmp_path, before_all(step[0], *step[1:]))
    with pytest.raises(QuantizationError, match="Expected inputs that the model can take"):
        model(X)


def test_no_text_of_a_program_becomes_code(artifact: Artifact, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    text = f"__import__('pathlib').Path({str(proof)!r}).touch()"

    def change(program: dict[str, Any]) -> None:
        for step in program["steps"]:
            step["kwargs"] = {f"x={text}, y": text}
        before_all("aten.pad.default", {"value": "input"}, [1, 1], text, **{text: text})(program)

    with pytest.raises(QuantizationError):
        load_changed(artifact, tmp_path, change)(X)
    assert not proof.exists()


def test_a_small_program_takes_little_memory_when_it_is_loaded(artifact: Artifact, tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        before_all("aten.zeros.default", [2**40])(program)
        outer = [{"value": "step.new"}, {"value": "step.new"}]
        program["steps"].insert(1, {"name": "step.outer", "call": "aten.mul.Tensor", "args": outer, "kwargs": {}})

    load_changed(artifact, tmp_path, change)


class Foreign(nn.Module):
    """A linear layer, and what a test wants after it."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = nn.Linear(6, 4)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(x))


# As operators in other languages are: nothing tells what it computes.
_LIBRARY = torch.library.Library("lightning_quant_tests", "FRAGMENT")
_LIBRARY.define("triple(Tensor x) -> Tensor")
_LIBRARY.impl("triple", lambda x: 3 * x, "CPU")
torch.library.register_fake("lightning_quant_tests::triple", torch.empty_like, lib=_LIBRARY)


def test_an_operator_outside_the_list_is_named_at_export(tmp_path: Path) -> None:
    model = Foreign(torch.ops.lightning_quant_tests.triple).eval()
    artifact = export(quantize_layers(model, (X,), recipe="int8_weight_only", runtime="torch"), tmp_path / "a")

    assert re.search(r"that only compute, but it calls .*triple", artifact.manifest["into_only"])


@pytest.mark.parametrize(
    "after",
    [
        lambda x: torch.empty(x.shape).copy_(x),
        lambda x: torch.empty_like(x).fill_(2.0) * x,
        lambda x: x.new_empty(x.shape[0], 3).zero_() + x[:, :3],
        lambda x: x.masked_fill_(x > 0, 0.0),
        lambda x: x[:, : max(1, min(x.shape[0], 3))] * (x.shape[0] // 2),
        lambda x: torch.no_grad()(torch.autocast("cpu", enabled=False)(lambda y: 2 * y))(x),
        lambda x: x[x > 0].sum()[None],
    ],
    ids=["empty", "empty_like", "new_empty", "in_place", "sizes", "contexts", "mask"],
)
def test_what_exporters_write_of_ordinary_code_is_in_the_list(after: Any, tmp_path: Path) -> None:
    quantized = quantize_layers(Foreign(after).eval(), (X,), recipe="int8_weight_only", runtime="torch")
    artifact = export(quantized, tmp_path / "a")
    loaded: Any = runtime.load(artifact.path, artifact.model_files, artifact.signature)
    with torch.no_grad():
        assert torch.equal(loaded(X), quantized.quantized()(X))
        assert torch.equal(loaded(X[:2]), quantized.quantized()(X[:2]))
