"""A commit gives a folder the new files at once, whatever ends the process meanwhile."""

import errno
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from written_folders import ONE, TWO, named, names, publish

from lightning_quant.artifact import stored
from lightning_quant.artifact.artifact import private_copy, read
from lightning_quant.artifact.commit import locked
from lightning_quant.errors import ArtifactError


def test_where_files_cannot_have_two_names_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for files in (ONE, TWO, ONE):
        artifact = publish(tmp_path, files, report=True)
        assert read(tmp_path).manifest == artifact.manifest
        assert names(tmp_path) == named(artifact)


def write_often(folder: Path, until: threading.Event) -> None:
    for number in itertools.count():
        if until.is_set():
            return
        publish(folder, [ONE, TWO, {"model.onnx": b"two" * 1000}][number % 3], report=True)


def test_a_reader_that_is_always_too_late_waits_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Path] = []

    @contextmanager
    def noted(path: Path) -> Iterator[None]:
        with locked(path):
            held.append(path)
            yield

    def check(*_: object) -> None:
        if not held:
            raise ArtifactError("another version came between")

    versions = itertools.count()
    monkeypatch.setattr(stored, "version", lambda _: next(versions))
    monkeypatch.setattr(stored, "locked", noted)
    monkeypatch.setattr(stored, "_check_files", check)
    assert read(publish(tmp_path, ONE)).size_bytes > 0
    assert held == [tmp_path]


def test_readers_beside_a_writer_see_whole_artifacts(tmp_path: Path) -> None:
    known = [publish(tmp_path / str(n), files).model_path.read_bytes() for n, files in enumerate((ONE, TWO))]
    done = threading.Event()
    publish(tmp_path / "q", ONE)
    writer = threading.Thread(target=write_often, args=(tmp_path / "q", done))
    writer.start()
    try:
        seen = set()
        for _ in range(100):
            with private_copy(tmp_path / "q") as own:
                seen.add(own.model_path.read_bytes())
                assert all((own.path / name).is_file() for name in own.manifest["files"].values())
            read(tmp_path / "q")
    finally:
        done.set()
        writer.join()
    assert seen <= {*known, b"two" * 1000}
    assert names(tmp_path / "q") == named(read(tmp_path / "q"))


# Every change of the folder is a call of one of these; at the k-th of them the process is killed, or it is refused.
CRASH = """
import errno, json, os, signal, sys
from pathlib import Path

sys.path[:0] = json.loads(sys.argv[1])
from written_folders import ONE, TWO, named, names, publish
from lightning_quant.artifact.artifact import check_folder, private_copy, read
from lightning_quant.errors import ArtifactError

root, kill = Path(sys.argv[2]), sys.argv[3] == "kill"
number = {"kill": 0, "full disk": errno.ENOSPC, "no permission": errno.EACCES}[sys.argv[3]]
WATCHED = ("replace", "rename", "link", "fsync", "unlink", "rmdir", "chmod", "mkdir")


reached = set()
# What a killed process has written is there without.
os.fsync = lambda descriptor: None


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
                raise OSError(number, os.strerror(number))
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
        except ArtifactError:
            os._exit(1)
        os._exit(1 if at in reached else 0)
    return os.waitpid(process, 0)[1] == 0


def content_of(artifact):
    where = artifact.model_path.parent
    return [(where / name).read_bytes() for name in sorted(artifact.model_files.values(), reverse=True)]


def scenario(name, old, new):
    outcomes = []
    for at in range(1, 200):
        folder = root / f"{name}_{at}"
        if old is not None:
            before = content_of(publish(folder, old, report=True))
        finished = attempt(folder, new, at)
        try:
            now = content_of(read(folder))
            outcomes.append("old" if old is not None and now == before else "new")
            assert now in (list((old or {}).values()), list(new.values()))
            with private_copy(folder) as own:
                assert content_of(own) == now
        except ArtifactError:
            outcomes.append("none")
        if not kill:
            left = [entry.name for entry in folder.glob(".lightning_quant-*") if entry.is_file()]
            assert left == [], (name, at, left)
        check_folder(folder)
        artifact = publish(folder, {"model.onnx": b"three"}, report=True)
        assert names(folder) == named(artifact), (name, at, names(folder) ^ named(artifact))
        if finished:
            break
    print(json.dumps([name, outcomes, finished]))


scenario("first", None, ONE)
scenario("fewer", TWO, ONE)
if kill:
    scenario("replace", ONE, {"model.onnx": b"two"})
    scenario("several", TWO, {"model.xml": b"2", "model.bin": b"3"})
"""


@pytest.mark.parametrize("how", ["kill", "full disk", "no permission"])
def test_crash_at_any_point_leaves_the_old_artifact_or_the_new_one(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASH, json.dumps([path for path in sys.path if path]), str(tmp_path), how]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [name for name, *_ in results] == ["first", "fewer"] + ["replace", "several"] * (how == "kill")
    for name, outcomes, finished in results:
        assert finished
        assert len(outcomes) > 10
        before, after = ("none", "new") if name == "first" else ("old", "new")
        assert set(outcomes) == {before, after}
        assert (outcomes[0], outcomes[-1]) == (before, after) or how != "kill"
        if how == "kill":
            assert outcomes == sorted(outcomes, key=[before, after].index)
