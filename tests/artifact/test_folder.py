import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from written_folders import ONE, TWO, named, names, publish

from lightning_quant import load, verify
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import check_folder, private_copy, read, staging
from lightning_quant.artifact.folder import output_folder
from lightning_quant.artifact.manifest import dump
from lightning_quant.errors import ArtifactError, NoEffectWarning

# --- names


def test_names_are_plain_and_stay_the_same(tmp_path: Path) -> None:
    for content in (b"1", b"2"):
        artifact = publish(tmp_path, {"model.onnx": content}, report=True)
        assert names(tmp_path) == {"manifest.json", "model.onnx", "golden.safetensors", "report.md", "report.json"}
        assert (tmp_path / "model.onnx").read_bytes() == content
        assert named(artifact) == names(tmp_path)
        assert read(tmp_path).manifest == artifact.manifest
    publish(tmp_path, TWO)
    assert names(tmp_path) == {"manifest.json", "model.xml", "model.bin", "golden.safetensors"}


def test_size_is_that_of_all_files_of_the_model(tmp_path: Path) -> None:
    artifact = publish(tmp_path, TWO)

    assert artifact.model_path.name == "model.xml"
    assert {name: (artifact.model_path.parent / name).read_bytes() for name in TWO} == TWO
    assert artifact.size_bytes == sum(map(len, TWO.values()))


def test_one_file_and_several_replace_each_other(tmp_path: Path) -> None:
    for files in (ONE, TWO, ONE, TWO, TWO):
        artifact = publish(tmp_path, files, report=True)
        assert read(tmp_path).manifest == artifact.manifest
        assert names(tmp_path) == named(artifact)


@pytest.mark.parametrize("damage", ["change", "remove", "add", "link"])
def test_damage_of_any_file_is_found(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    path = publish(folder, TWO).model_path.with_name("model.bin")
    if damage == "change":
        path.write_bytes(b"wEights")
    elif damage == "remove":
        path.unlink()
    elif damage == "link":
        path.rename(tmp_path / "model.bin")
        path.symlink_to(tmp_path / "model.bin")
    else:
        path.with_name("notes.txt").write_text("harmless")
        read(folder)
        return
    with pytest.raises(ArtifactError, match=r"content has changed|is missing|is a link"):
        read(folder)


# --- artifacts with the names of an older version


def older(folder: Path, files: dict[str, bytes]) -> dict[str, Any]:
    """Give an artifact the names that files had: their hash in it, and several of a model in a folder."""
    manifest = publish(folder, files, report=True).manifest
    content, hashes = {}, {}
    for role, name in manifest["files"].items():
        digest = manifest["sha256"][name]
        stem, dot, suffix = name.partition(".")
        hashed = f"{stem}-{digest[:12]}{dot}{suffix}"
        if len(files) > 1 and name in files:
            hashed = f"model-0123456789ab/{name}"
            (folder / "model-0123456789ab").mkdir(exist_ok=True)
        (folder / name).rename(folder / hashed)
        content[role], hashes[hashed] = hashed, digest
    text, changed = dump({**manifest, "files": content, "sha256": hashes})
    (folder / "manifest.json").write_text(text)
    return changed


@pytest.mark.parametrize("files", [ONE, TWO], ids=["one file", "several files"])
def test_older_names_are_read_and_replaced(files: dict[str, bytes], tmp_path: Path) -> None:
    manifest = older(tmp_path, files)
    artifact = read(tmp_path)
    assert artifact.manifest == manifest
    assert artifact.size_bytes == sum(map(len, files.values()))
    with private_copy(tmp_path) as own:
        assert own.model_path.read_bytes() == next(iter(files.values()))
    again = artifacts.add_report(artifact, {"b": 2}, "# New")
    assert read(again).report == {"b": 2}
    assert names(tmp_path) == named(again)
    older(tmp_path, files)
    new = publish(tmp_path, {"model.onnx": b"new"})
    assert names(tmp_path) == named(new)
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == []


# --- whose folder it is


@pytest.mark.parametrize("files", [ONE, TWO], ids=["one file", "several files"])
def test_damaged_artifact_of_ours_can_be_replaced(files: dict[str, bytes], tmp_path: Path) -> None:
    for damage in (b"", b"other"):
        path = publish(tmp_path, files).model_path
        path.write_bytes(damage)
        with pytest.raises(ArtifactError, match="content has changed"):
            read(tmp_path)
        check_folder(tmp_path)
        # The same model again, and another.
        assert read(publish(tmp_path, files).path).model_path.read_bytes() == next(iter(files.values()))
        path.write_bytes(damage)
        other = publish(tmp_path, {"model.onnx": b"new"})
        assert names(tmp_path) == named(other)


def test_manifest_with_a_wrong_hash_can_be_replaced(tmp_path: Path) -> None:
    publish(tmp_path, ONE)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("int8", "int9"))
    with pytest.raises(ArtifactError, match="content has changed"):
        read(tmp_path)
    check_folder(tmp_path)
    artifact = publish(tmp_path, TWO)
    assert read(tmp_path).manifest == artifact.manifest


@pytest.mark.parametrize(
    "text", ["", '{"format_version": 1', '{"name": "a browser\'s extension"}', "[1]", "[" * 100000]
)
def test_manifest_of_somebody_else_is_refused_with_ways_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"something else or damaged\. Choose another folder, or remove"):
        check_folder(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == text


def test_artifact_of_a_newer_format_is_not_replaced(tmp_path: Path) -> None:
    artifact = publish(tmp_path, ONE)
    (tmp_path / "manifest.json").write_text(dump({**artifact.manifest, "format_version": 2})[0])
    with pytest.raises(ArtifactError, match=r"has format 2: upgrade lightning_quant, or choose another folder"):
        check_folder(tmp_path)


def test_files_that_are_not_ours_are_refused_in_front_of_an_artifact_and_kept_beside_one(tmp_path: Path) -> None:
    stranger = tmp_path / "model.onnx"
    stranger.write_bytes(b"somebody's")
    with pytest.raises(ArtifactError, match=r"holds other files, such as 'model\.onnx'"):
        check_folder(tmp_path)
    stranger.unlink()
    publish(tmp_path, ONE)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").write_text("mine")
    publish(tmp_path, TWO)
    assert (tmp_path / "logs" / "metrics.csv").read_text() == "mine"


def test_files_with_a_name_that_a_later_artifact_needs_are_kept_under_another(tmp_path: Path) -> None:
    publish(tmp_path, ONE)
    (tmp_path / "model.xml").write_bytes(b"mine")
    (tmp_path / "report.md").mkdir()
    (tmp_path / "report.md" / "mine").touch()
    with pytest.warns(
        NoEffectWarning, match=r"model\.xml was no file of the artifact's: it is kept as model\.xml\.kept1"
    ):
        publish(tmp_path, TWO)
    assert (tmp_path / "model.xml.kept1").read_bytes() == b"mine"
    with pytest.warns(NoEffectWarning, match=r"kept as report\.md\.kept1"):
        publish(tmp_path, TWO, report=True)
    assert (tmp_path / "report.md.kept1" / "mine").exists()
    read(tmp_path)
    publish(tmp_path, TWO, report=True)


# --- several at once


def test_writers_that_stage_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    with staging(tmp_path) as first, staging(tmp_path) as second:
        (first / "mine").touch()
        publish(tmp_path, ONE)
        assert (first / "mine").exists()
        assert second.is_dir()
    assert names(tmp_path) == named(read(tmp_path))


def test_a_report_is_not_added_to_another_artifact(tmp_path: Path) -> None:
    mine = publish(tmp_path / "q", ONE)
    theirs = publish(tmp_path / "q", TWO)
    with pytest.raises(ArtifactError, match=r"another run has replaced it: give every run an `output_dir` of its own"):
        artifacts.add_report(mine, {"a": 1}, "# Mine")
    for reader in (read, load, verify):
        with pytest.raises(ArtifactError, match="another run has replaced it"):
            reader(mine)
    assert read(theirs).manifest == theirs.manifest
    assert names(tmp_path / "q") == named(theirs)


def test_an_artifact_that_was_replaced_while_it_was_measured_is_kept_beside(tmp_path: Path) -> None:
    (tmp_path / "q-2").mkdir()
    (tmp_path / "q-2" / "mine.txt").touch()
    mine = publish(tmp_path / "q", ONE)
    with private_copy(mine) as own:
        theirs = publish(tmp_path / "q", TWO, report=True)
        with pytest.warns(NoEffectWarning, match=r"another run has replaced it.* This run's artifact is in .*q-3\."):
            kept = artifacts.add_report(mine, {"a": 1}, "# Mine", own=own)
    assert kept.path == tmp_path / "q-3"
    assert read(kept).report == {"a": 1}
    assert kept.model_path.read_bytes() == ONE["model.onnx"]
    assert read(theirs).manifest == theirs.manifest
    assert names(tmp_path / "q-2") == {"mine.txt"}


@pytest.mark.parametrize("loss", ["folder", "content"])
def test_an_artifact_that_somebody_removed_while_it_was_measured_is_written_again(loss: str, tmp_path: Path) -> None:
    mine = publish(tmp_path / "q", ONE)
    with private_copy(mine) as own:
        shutil.rmtree(tmp_path / "q")
        if loss == "content":
            (tmp_path / "q").mkdir()
        again = artifacts.add_report(mine, {"a": 1}, "# Mine", own=own)
    assert again.path == mine.path
    assert read(again).report == {"a": 1}


def test_the_same_model_written_again_takes_the_report(tmp_path: Path) -> None:
    mine = publish(tmp_path, ONE)
    publish(tmp_path, ONE, report=True)
    artifacts.add_report(mine, {"b": 2}, "# Mine")
    assert read(tmp_path).report == {"b": 2}


# --- spellings


def test_spellings_of_one_folder_are_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    spellings = [
        "a/q",
        "./a/../a/q",
        "~/a/q",
        "link/q",
        tmp_path / "a" / "q",
        str(tmp_path / "link" / ".." / "a" / "q"),
    ]

    assert {output_folder(spelling) for spelling in spellings} == {tmp_path / "a" / "q"}
    assert {check_folder(spelling) for spelling in spellings} == {tmp_path / "a" / "q"}
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "dangling",
        "dangling/below",
        "loop",
        "loop/below",
        "x" * 300,
        "new/" + "x" * 300,
        "new/" + "/".join(["x" * 200] * 30),
        "nul\x00",
        "file",
        "file/below",
        "~nobody-of-that-name/x",
        "pipe",
        3,
        None,
        b"bytes",
    ],
    ids=lambda name: repr(name)[:30],
)
def test_odd_names_are_refused_and_leave_nothing(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match="Expected `output_dir`"):
        check_folder(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="to be a folder that can be written"):
        check_folder("/proc/lightning_quant")
    for odd in ("pipe", "link"):
        folder = tmp_path / odd
        folder.mkdir()
        os.mkfifo(folder / "manifest.json") if odd == "pipe" else (folder / "manifest.json").symlink_to("/dev/zero")
        with pytest.raises(ArtifactError, match="something else or damaged"):
            check_folder(folder)
        with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read: .*(regular file|link)"):
            load(folder)


# --- crashes
