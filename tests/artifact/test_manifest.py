import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant import load, quantize, runtimes, verify
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.manifest import dump, parse
from lightning_quant.calls.signature import TensorInfo
from lightning_quant.errors import ArtifactError, QuantizationError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

NUMBER = 300
GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(5, 6, generator=GENERATOR), torch.randn(5, 4, generator=GENERATOR)


class Net(nn.Module):
    """Two inputs, a default, a constant, and a nested result: something of everything in a signature."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.class_names = ["cat", "dog", "owl"]

    def forward(self, a: Tensor, b: Tensor, *, gain: float = 1.0, floor: float = float("-inf")) -> dict[str, Any]:
        joint = F.relu(self.left(a)) + gain * F.relu(self.right(b))
        return {"scores": self.head(joint).clamp(min=floor), "more": (joint, "constant", [a])}


def answer(path: Path) -> dict[str, Any]:
    return load(path, threads=1)(A, b=B)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    return quantize(Net(), calibration_data=[(A, B)], output_dir=tmp_path_factory.mktemp("manifest") / "artifact")


@pytest.fixture(scope="module")
def expected(artifact: Artifact) -> dict[str, Any]:
    return answer(artifact.path)


# --- round trip


def test_what_is_written_is_read(artifact: Artifact) -> None:
    text = (artifact.path / "manifest.json").read_text()

    assert parse(text) == artifact.manifest
    assert dump(artifact.manifest) == (text, artifact.manifest)


def test_infinities_survive_in_numbers_that_json_has(artifact: Artifact, expected: dict[str, Any]) -> None:
    json.loads((artifact.path / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert same(load(artifact.path)(A, B, gain=1.0, floor=float("-inf")), expected)
    with pytest.raises(QuantizationError, match="constants of the captured call"):
        load(artifact.path)(A, B, floor=0.0)


# --- 300 corruptions by somebody who knows nothing of hashes


def _flip(data: bytearray, dice: random.Random) -> bytes:
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def _overwrite(data: bytearray, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    data[start : start + 50] = dice.randbytes(len(data[start : start + 50]))
    return bytes(data)


CORRUPTIONS: list[Callable[[bytearray, random.Random], bytes | None]] = [
    _flip,
    _overwrite,
    lambda data, dice: bytes(data[: dice.randrange(len(data))]),
    lambda data, dice: bytes(data) + dice.randbytes(dice.randrange(1, 20)),
    lambda data, dice: dice.randbytes(dice.randrange(200)),
    lambda data, dice: b"",
    lambda data, dice: None,
]


def test_random_corruptions_are_refused(artifact: Artifact, expected: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact.path, tmp_path / "copy"))
    names = ["manifest.json", *artifact.manifest["files"].values()]
    dice = random.Random(0)
    refused = 0
    for _ in range(NUMBER):
        path = folder / dice.choice(names)
        before = path.read_bytes()
        after = dice.choice(CORRUPTIONS)(bytearray(before), dice)
        path.unlink()
        if after is not None:
            path.write_bytes(after)
        if _harmless(path, before, after):
            assert same(answer(folder), expected)
        else:
            with pytest.raises(ArtifactError):
                load(folder, threads=1)
            refused += 1
        path.write_bytes(before)
    assert refused > 0.95 * NUMBER
    assert same(answer(folder), expected)


def _harmless(path: Path, before: bytes, after: bytes | None) -> bool:
    """Tell whether nothing changed, or only blanks between the fields of the manifest."""
    if after is None or path.name != "manifest.json":
        return after == before
    try:
        return json.loads(after) == json.loads(before)
    except (ValueError, RecursionError):
        return False


# --- 300 manifests by somebody who knows how hashes are made

STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    10**30,
    1e300,
    -0.5,
    "",
    "x",
    "float64",
    "int64",
    "batch",
    "../outside",
    "/etc/passwd",
    "a/b/c",
    "..",
    ".",
    "manifest.json",
    "\x00",
    "ü",
    [],
    {},
    [[]],
    [None],
    {"x": 1},
    ["a", "b"],
    {"tensor": 0},
    {"float": "x"},
    {"value": 1e308},
    "required",
    "openvino",
    "nonsense",
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _mutate(manifest: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    manifest = copy.deepcopy(manifest)
    # The report is long and free of form; what decides how a model is run is the rest.
    places = [place for place in _places(manifest) if place[0] not in ("report", "manifest_sha256")]
    heads = sorted({place[0] for place in places})
    head = dice.choice(heads)
    *parents, key = dice.choice([place for place in places if place[0] == head])
    owner: Any = manifest
    for parent in parents:
        owner = owner[parent]
    kind = dice.choice(["replace", "replace", "replace", "remove", "add", "swap"])
    if kind == "replace":
        owner[key] = dice.choice(STRANGE)
    elif kind == "remove":
        del owner[key]
    elif kind == "add":
        if isinstance(owner, dict):
            owner[dice.choice(["x", "extra", "data_0", "../x"])] = dice.choice(STRANGE)
        else:
            owner.insert(0, copy.deepcopy(dice.choice([*STRANGE, owner[key]])))
    else:
        other = dice.choice(places)
        value = manifest
        for parent in other:
            value = value[parent]
        owner[key] = copy.deepcopy(value)
    return manifest


def test_mutated_manifests_with_right_hashes_are_refused_or_change_nothing(
    artifact: Artifact, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifact.path, tmp_path / "copy"))
    (tmp_path / "outside").write_bytes(artifact.model_path.read_bytes())
    dice = random.Random(0)
    refused = 0
    for _ in range(NUMBER):
        mutated = _mutate(artifact.manifest, dice)
        (folder / "manifest.json").write_text(dump(mutated)[0], encoding="utf-8")
        try:
            loaded = answer(folder)
            verify(folder, threads=1)
        except QuantizationError:
            refused += 1
        else:
            assert same(loaded, expected), mutated
    assert refused > 0.5 * NUMBER


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format_version",), True, "positive integer"),
        (("format_version",), "1", "positive integer"),
        (("format_version",), 0, "positive integer"),
        (("format_version",), 10**9, "upgrade lightning_quant"),
        (("recipe",), 8, "`recipe` in manifest.json to be a name"),
        (("surprise",), 1, r"unknown fields \['surprise'\]"),
        (("files", "model"), "a/../b", "inside the folder"),
        (("files", "model"), "..", "inside the folder"),
        (("files", "model"), "", "inside the folder"),
        (("files", "model"), "x" * 1000, "inside the folder"),
        (("files", "model"), "model\x00.onnx", "inside the folder"),
        (("files", "golden"), None, "inside the folder"),
        (("sha256", "another"), "0" * 64, "one hash for each"),
        (("plan", "rows"), [{}], "`plan`"),
        (("plan", "coverage"), "all", "`plan`"),
        (("classes",), [1, 2], "list of labels"),
        (("signature", "structure"), {"tensor": 3}, "signature"),
        (("signature", "structure"), {"dict": [[[1], {"tensor": 0}]]}, "signature"),
        (("signature", "inputs", 0, "dtype"), "Tensor", "is no dtype"),
        (("signature", "inputs", 0, "shape"), [-1, 6], "is no size"),
        (("signature", "inputs", 0, "shape"), [10**30, 6], "is no size"),
        (("signature", "inputs", 0, "shape"), ["batch", 7], "were not written together"),
        (("classes",), ["dog", "cat", "owl"], "were not written together"),
        (("signature", "parameters", 0), ["a b", "KEYWORD_ONLY", "required"], "signature"),
        (("signature", "parameters", 0), ["a", "SOMETIMES", "required"], "signature"),
    ],
)
def test_fields_of_other_types_are_refused(
    place: tuple[Any, ...], value: Any, message: str, artifact: Artifact, tmp_path: Path
) -> None:
    manifest = copy.deepcopy(artifact.manifest)
    owner: Any = manifest
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    folder = Path(shutil.copytree(artifact.path, tmp_path / "copy"))
    (folder / "manifest.json").write_text(dump(manifest)[0])
    with pytest.raises(ArtifactError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": (TensorInfo("a", "float32", ("batch", 7)),)},
        {"inputs": (TensorInfo("a", "float64", ("batch", 6)),)},
        {"inputs": (TensorInfo("c", "float32", ("batch", 6)),)},
        {"inputs": ()},
        {"outputs": (TensorInfo("scores", "float32", ("batch", 3)),)},
        {"outputs": (TensorInfo("scores", "int64", ("batch", 3)), TensorInfo("more_0", "float32", ("batch", 8)))},
    ],
)
def test_signature_of_another_model_is_refused(change: dict[str, Any], artifact: Artifact) -> None:
    runtime = runtimes.get("onnxruntime")
    runtime.load(artifact.path, artifact.model_files, artifact.signature)
    with pytest.raises(ArtifactError, match="inputs and outputs of its signature"):
        runtime.load(artifact.path, artifact.model_files, dataclasses.replace(artifact.signature, **change))


@pytest.mark.parametrize("text", ["", "null", "7", '"text"', "[" * 100000, '{"a":' * 100000, "NaN", "9" * 5000])
def test_texts_that_are_no_manifest_are_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="manifest"):
        parse(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_numbers_that_json_does_not_have_are_refused(number: str, artifact: Artifact) -> None:
    text = (artifact.path / "manifest.json").read_text().replace('"coverage": 1.0', f'"coverage": {number}', 1)
    assert number in text
    with pytest.raises(ArtifactError, match="manifest"):
        parse(text)
