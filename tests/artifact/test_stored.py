"""What is read back from a folder, whatever became of it meanwhile."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import pytest
from small_artifacts import X, change_manifest

from lightning_quant import load, runtimes
from lightning_quant.artifact.artifact import read
from lightning_quant.artifact.manifest import FORMAT_VERSION, dump
from lightning_quant.errors import ArtifactError, MissingRuntimeError, QuantizationError


def _change_a_byte(folder: Path) -> None:
    path = read(folder).model_path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = read(folder).model_path
    path.write_bytes(path.read_bytes()[:-10])


def _empty(folder: Path) -> None:
    read(folder).model_path.write_bytes(b"")


def _remove(folder: Path) -> None:
    read(folder).model_path.unlink()


def _change_the_golden_batch(folder: Path) -> None:
    path = read(folder).golden_path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _change_the_report(folder: Path) -> None:
    path = read(folder).report_path
    path.write_text(path.read_text().replace("1", "2"))


def _change_a_number_of_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"coverage": 1.0', '"coverage": 0.5'))


def _newer_format(folder: Path) -> None:
    change_manifest(folder, format_version=FORMAT_VERSION + 1)


def _name_model(folder: Path, name: str) -> None:
    artifact = read(folder)
    files, hashes = dict(artifact.manifest["files"]), dict(artifact.manifest["sha256"])
    hashes[name] = hashes.pop(files["model"])
    change_manifest(folder, files={**files, "model": name}, sha256=hashes)


def _outside(folder: Path) -> None:
    shutil.copy(read(folder).model_path, folder.parent / "outside.onnx")
    _name_model(folder, "../outside.onnx")


def _absolute(folder: Path) -> None:
    _name_model(folder, str(read(folder).model_path.absolute()))


def _link(folder: Path) -> None:
    path = read(folder).model_path
    path.rename(folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)


def _without_hash(folder: Path) -> None:
    change_manifest(folder, sha256={})


def _without_model(folder: Path) -> None:
    change_manifest(folder, files={})


def _without_golden_batch(folder: Path) -> None:
    artifact = read(folder)
    name = artifact.golden_path.name
    change_manifest(
        folder,
        files={role: file for role, file in artifact.manifest["files"].items() if role != "golden"},
        sha256={file: value for file, value in artifact.manifest["sha256"].items() if file != name},
    )


def _no_json(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _another_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('["a", "list"]')


def _without_signature(folder: Path) -> None:
    change_manifest(folder, signature={})


def _without_runtime(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["runtime"]
    path.write_text(dump(manifest)[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change_a_byte, "content has changed"),
        (_truncate, "content has changed"),
        (_empty, "content has changed"),
        (_remove, "is missing"),
        (_change_the_golden_batch, "content has changed"),
        (_change_the_report, "content has changed"),
        (_change_a_number_of_the_manifest, "content has changed"),
        (_newer_format, "upgrade lightning_quant"),
        (_outside, "`files` .* inside the folder"),
        (_absolute, "`files` .* inside the folder"),
        (_link, "is a link"),
        (_without_hash, "one hash for each"),
        (_without_model, "`files` .* with a model"),
        (_without_golden_batch, "and a golden batch"),
        (_no_json, "cannot be read"),
        (_no_manifest, "cannot be read"),
        (_another_manifest, "something else"),
        (_without_signature, "signature"),
        (_without_runtime, "runtime"),
    ],
)
def test_damage_is_found_when_loading(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    assert load(folder)(X).shape == (8, 3)
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"to hold an artifact, but its manifest\.json cannot be read"):
        load(tmp_path / "nowhere")


def test_runtime_of_another_version_of_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "names", lambda: ["abacus"])
    with pytest.raises(QuantizationError, match=r"`runtime` to be one of \['abacus'\], but got 'onnxruntime'"):
        load(folder)


def test_runtime_that_is_not_installed_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(MissingRuntimeError, match=r"pip install onnxruntime"):
        load(folder)


def test_artifacts_below_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "int8-torch").mkdir()
    (tmp_path / "int8-torch" / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"Below it are artifacts: give .*int8-torch\.$"):
        read(tmp_path)


def test_a_file_is_told_from_the_folder_that_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    with pytest.raises(ArtifactError, match=r"which is a folder, but .*last\.ckpt is a file\.$"):
        read(tmp_path / "last.ckpt")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"is a file\. Give the folder that it is in"):
        read(tmp_path / "last.ckpt")
