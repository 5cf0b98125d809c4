import functools
import hashlib
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import onnx
import pytest
import torch
from small_artifacts import X, change_manifest, make
from torch import nn

import lightning_quant
from lightning_quant import Artifact, Recipe, load, quantize, verify
from lightning_quant.artifact import artifact as artifact_module
from lightning_quant.artifact.artifact import check_folder, read
from lightning_quant.artifact.manifest import FORMAT_VERSION
from lightning_quant.errors import ArtifactError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is in the folder


def test_folder_holds_model_manifest_and_report_and_nothing_else(original: Artifact) -> None:
    names = {path.name for path in original.path.iterdir()}

    assert names == {"manifest.json", *original.manifest["files"].values()}
    assert set(original.manifest["files"]) == {"model", "golden", "report.md", "report.json", "report.html"}


def test_files_have_plain_names_and_the_manifest_their_hashes(original: Artifact) -> None:
    files = {name: digest(original.path / name) for name in original.manifest["files"].values()}

    assert set(files) == {"model.onnx", "golden.safetensors", "report.md", "report.json", "report.html"}
    assert original.manifest["sha256"] == files


def test_size_is_that_of_the_model_on_disk(original: Artifact) -> None:
    assert original.size_bytes == original.model_path.stat().st_size
    assert original.report["artifact_bytes"] == original.size_bytes


def test_size_counts_every_file_of_the_model_and_neither_golden_batch_nor_report(folder: Path) -> None:
    weights = folder / "model.bin"
    weights.write_bytes(b"0" * 1000)
    manifest = read(folder).manifest
    files, hashes = manifest["files"], manifest["sha256"]
    before = read(folder).size_bytes
    change_manifest(folder, files={**files, "weights": weights.name}, sha256={**hashes, weights.name: digest(weights)})

    assert read(folder).size_bytes == before + 1000


def test_manifest_says_what_the_model_is_and_where_it_comes_from(original: Artifact) -> None:
    manifest = json.loads((original.path / "manifest.json").read_text())

    assert manifest == json.loads(json.dumps(original.manifest))
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["recipe"] == "int8"
    assert manifest["runtime"] == "onnxruntime"
    assert manifest["versions"]["torch"] == torch.__version__
    assert {"lightning_quant", "lightning", "safetensors", "onnx", "onnxruntime"} <= set(manifest["versions"])
    assert manifest["python"]
    assert manifest["cpu"]
    assert manifest["plan"]["coverage"] == 1.0
    assert [info["shape"] for info in manifest["signature"]["inputs"]] == [["batch", 6]]


def test_packages_without_metadata_have_their_versions_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a source tree, a vendored copy, or a zip on the path.
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    artifact_module._version.cache_clear()
    versions = make(tmp_path / "quantized").manifest["versions"]
    artifact_module._version.cache_clear()

    assert versions["lightning_quant"] == lightning_quant.__version__
    assert versions["torch"] == torch.__version__
    assert all(versions.values())


def test_plan_lists_every_layer(original: Artifact) -> None:
    actions = {row["name"]: row["action"] for row in original.plan["rows"]}

    assert actions == {"0": "int8", "1": "fused", "2": "int8"}


def test_reports_lie_beside_the_model(original: Artifact) -> None:
    report = json.loads((original.path / original.manifest["files"]["report.json"]).read_text())

    assert report == original.report
    assert report["float_bytes"] == 4 * (6 * 8 + 8 + 8 * 3 + 3)
    assert original.report_path.read_text().startswith("# int8 on onnxruntime\n")


def test_json_holds_numbers_that_every_reader_knows(original: Artifact) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for name in ("manifest.json", original.manifest["files"]["report.json"]):
        json.loads((original.path / name).read_text(), parse_constant=refuse)


def test_files_are_readable_for_others(original: Artifact) -> None:
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in original.path.iterdir())


def test_weights_in_a_file_of_their_own_stay_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What PyTorch's exporter does by itself above 2 GB.
    monkeypatch.setattr(
        torch.onnx.ONNXProgram, "save", functools.partialmethod(torch.onnx.ONNXProgram.save, external_data=True)
    )
    artifact = make(tmp_path / "first")
    moved = Path(shutil.move(artifact.path, tmp_path / "second"))

    assert sorted(artifact.model_files.values()) == ["model.onnx", "model.onnx.data"]
    assert load(moved)(X).shape == (8, 3)
    assert verify(moved).identical
    assert read(moved).size_bytes == sum((moved / name).stat().st_size for name in artifact.model_files.values())


def test_onnx_files_say_what_they_are(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model.classes = ["cat", "dog"]
    calls = [torch.linspace(-1, 3, 32).reshape(4, 8)]
    artifact = quantize(
        model, Recipe(name="mine", calibration_observer="min_max"), calibration_data=calls, output_dir=tmp_path
    )
    prefix = "lightning_quant."
    said = {entry.key.removeprefix(prefix): entry.value for entry in onnx.load(artifact.model_path).metadata_props}

    assert said["version"] == lightning_quant.__version__
    assert said["recipe"] == "mine"
    assert json.loads(said["classes"]) == ["cat", "dog"]
    low, high = json.loads(said["input_ranges"])[artifact.signature.inputs[0].name]
    assert (low, high) == (pytest.approx(-1, abs=0.02), pytest.approx(3, abs=0.02))


def test_artifact_can_be_moved(original: Artifact, folder: Path) -> None:
    assert torch.equal(load(folder)(X), load(original.path)(X))
    assert torch.equal(load(str(folder))(X), load(original.path)(X))


# --- replacing


def test_our_own_artifact_is_replaced_and_the_old_model_removed(folder: Path, original: Artifact) -> None:
    before = load(folder)(X)
    new = make(folder, seed=1)

    assert {path.name for path in folder.iterdir()} == {"manifest.json", *new.manifest["files"].values()}
    assert new.manifest["sha256"]["model.onnx"] != original.manifest["sha256"]["model.onnx"]
    assert not torch.equal(load(folder)(X), before)
    assert read(folder).report == new.report


def test_same_model_again_is_kept(folder: Path, original: Artifact) -> None:
    assert make(folder).manifest["sha256"]["model.onnx"] == original.manifest["sha256"]["model.onnx"]
    assert torch.equal(load(folder)(X), load(original.path)(X))


def test_files_that_the_user_put_beside_are_kept(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    make(folder, seed=1)

    assert (folder / "notes.txt").read_text() == "mine"


def test_interrupted_replacement_leaves_the_old_artifact(
    folder: Path, original: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Any, destination: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, seed=1)
    monkeypatch.undo()

    assert torch.equal(load(folder)(X), load(original.path)(X))
    make(folder, seed=2)
    assert load(folder)(X).shape == (8, 3)


def test_failed_export_leaves_the_old_artifact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quant.runtimes import onnxruntime

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no space left on device")

    before = content(folder)
    monkeypatch.setattr(onnxruntime.RUNTIME, "export", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        make(folder, seed=1)

    assert content(folder) == before


# --- folders that are not ours


def test_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"somebody else's")
    before = content(tmp_path)
    with pytest.raises(ArtifactError, match=r"empty or an artifact of ours.*Choose another folder"):
        make(tmp_path)

    assert content(tmp_path) == before


def test_empty_and_missing_folders_are_accepted(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")

    assert list(tmp_path.iterdir()) == []


# --- damage
