import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_quant import artifact as artifacts
from lightning_quant import golden
from lightning_quant.artifact import Artifact, check_folder, read, staging
from lightning_quant.errors import ArtifactError
from lightning_quant.manifest import dump

SIGNATURE = {"parameters": [], "inputs": [], "constants": [], "outputs": [], "structure": {"constant": None}}
CONTENT = {
    "recipe": "int8",
    "runtime": "onnxruntime",
    "signature": SIGNATURE,
    "plan": {"coverage": 1.0, "rows": []},
    "outside": "nothing",
}
ONE, TWO = {"model.onnx": b"one"}, {"model.xml": b"two", "model.bin": b"weights"}


def publish(folder: Path, files: dict[str, bytes], *, report: bool = False) -> Artifact:
    """Write files as an artifact; the first is the model, and no runtime looks at it."""
    with staging(folder) as stage:
        for name, data in files.items():
            (stage / name).write_bytes(data)
        golden.save(stage / golden.FILE, golden.GoldenBatch((), (), ()), CONTENT)
        artifact = artifacts.write(folder, stage / next(iter(files)), CONTENT)
    return artifacts.add_report(artifact, {"a": 1}, "# Report") if report else artifact


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def named(artifact: Artifact) -> set[str]:
    return {"manifest.json", *artifact.manifest["files"].values()}


# --- models of several files


def test_model_of_several_files_is_a_folder_named_after_all_of_them(tmp_path: Path) -> None:
    artifact = publish(tmp_path, TWO)

    assert names(tmp_path) == named(artifact)
    assert artifact.model_path.name == "model.xml"
    assert {name: (artifact.model_path.parent / name).read_bytes() for name in TWO} == TWO
    assert artifact.size_bytes == sum(map(len, TWO.values()))
    other = publish(tmp_path, {**TWO, "model.bin": b"Weights"})
    assert other.model_path.parent.name != artifact.model_path.parent.name
    assert names(tmp_path) == named(other)


def test_one_file_and_several_replace_each_other(tmp_path: Path) -> None:
    for files in (ONE, TWO, ONE, TWO, TWO):
        artifact = publish(tmp_path, files, report=True)
        assert read(tmp_path).manifest == artifact.manifest
        assert names(tmp_path) == named(artifact)


@pytest.mark.parametrize("damage", ["change", "remove", "add", "link"])
def test_damage_inside_the_models_folder_is_found(damage: str, tmp_path: Path) -> None:
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


def test_files_whose_names_only_look_like_ours_are_kept_and_refused(tmp_path: Path) -> None:
    stranger = tmp_path / "model-202611220315.onnx"
    stranger.write_bytes(b"a date, no hash")
    with pytest.raises(ArtifactError, match=r"holds other files, such as 'model-202611220315\.onnx'"):
        check_folder(tmp_path)
    stranger.unlink()
    publish(tmp_path, ONE)
    stranger.write_bytes(b"a date, no hash")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").write_text("mine")
    publish(tmp_path, TWO)
    assert stranger.read_bytes() == b"a date, no hash"
    assert (tmp_path / "logs" / "metrics.csv").read_text() == "mine"


def test_two_writers_at_once_are_told_so(tmp_path: Path) -> None:
    with staging(tmp_path), pytest.raises(ArtifactError, match=r"nobody else to be writing.*`output_dir` of its own"):
        publish(tmp_path, ONE)
    publish(tmp_path, ONE)


# --- crashes

# Every change of the folder is a call of one of these; the process is killed, or the disk full, at the k-th of them.
CRASH = """
import errno, json, os, signal, sys
from pathlib import Path

sys.path[:0] = json.loads(sys.argv[1])
from test_folder import ONE, TWO, named, names, publish
from lightning_quant.artifact import check_folder, read
from lightning_quant.errors import ArtifactError

root, kill = Path(sys.argv[2]), sys.argv[3] == "kill"
WATCHED = ("replace", "fsync", "unlink", "rmdir", "chmod", "mkdir")


reached = set()


def interrupt(at):
    calls = 0
    def wrap(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            reached.add(calls)
            if calls == at:
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)
        return call
    for name in WATCHED:
        setattr(os, name, wrap(getattr(os, name)))


def attempt(folder, files, at):
    process = os.fork()
    if process == 0:
        interrupt(at)
        try:
            publish(folder, files, report=True)
        except OSError:
            os._exit(1)
        os._exit(1 if at in reached else 0)
    return os.waitpid(process, 0)[1] == 0


def scenario(name, old, new):
    outcomes = []
    for at in range(1, 200):
        folder = root / f"{name}_{at}"
        if old is not None:
            before = publish(folder, old, report=True).manifest["files"]["model"]
        finished = attempt(folder, new, at)
        try:
            now = read(folder).manifest["files"]["model"]
            outcomes.append("old" if old is not None and now == before else "new")
        except ArtifactError:
            outcomes.append("none")
        check_folder(folder)
        artifact = publish(folder, {"model.onnx": b"three"}, report=True)
        assert names(folder) == named(artifact), (name, at, names(folder) ^ named(artifact))
        if finished:
            break
    print(json.dumps([name, outcomes, finished]))


scenario("first", None, ONE)
scenario("replace", ONE, {"model.onnx": b"two"})
scenario("several", TWO, {"model.xml": b"2", "model.bin": b"3"})
"""


@pytest.mark.parametrize("how", ["kill", "full disk"])
def test_crash_at_any_point_leaves_the_old_artifact_or_the_new_one(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASH, json.dumps([path for path in sys.path if path]), str(tmp_path), how]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [name for name, *_ in results] == ["first", "replace", "several"]
    for name, outcomes, finished in results:
        assert finished
        assert len(outcomes) > 10
        before, after = ("none", "new") if name == "first" else ("old", "new")
        assert set(outcomes) == {before, after}
        assert (outcomes[0], outcomes[-1]) == (before, after) or how == "full disk"
        if how == "kill":
            assert outcomes == sorted(outcomes, key=[before, after].index)
