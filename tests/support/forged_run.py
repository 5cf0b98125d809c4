"""Loads and calls forged model files in a process of its own, under audit hooks and a limit of memory.

`python forged_run.py FOLDER NUMBER WHAT` prints what went wrong, with a folder that holds what `prepare_folder` wrote;
WHAT is "files", those of the model, or "folder", the manifest and the golden batch beside them.
"""

import contextlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forged_files import foreign_files, forge, forge_folder

from lightning_quant import load, runtimes, verify
from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import Artifact, read
from lightning_quant.artifact.commit import current
from lightning_quant.calls.signature import Signature
from lightning_quant.cli import cli
from lightning_quant.errors import QuantizationError

MAX_GROWTH_BYTES = 2**29
"""Memory that loading may take beyond what the process had."""
_ADDRESS_SPACE = 12 * 2**30
# Once ours and the runtime's modules are there, none of these is any business of opening a file.
_FORBIDDEN = (
    "exec", "compile", "import", "marshal", "pickle", "code.__new__", "socket", "subprocess", "os.system", "os.exec",
    "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "shutil", "ctypes.dlopen", "urllib", "webbrowser", "sys.settrace",
)  # fmt: skip


def prepare_folder(artifact: Artifact, folder: Path) -> None:
    """Write what the script needs: the model's files, how it is called, and a call."""
    (folder / "whole").mkdir()
    files = {role: Path(name).name for role, name in artifact.model_files.items()}
    for name in files.values():
        shutil.copy(artifact.model_path.parent / name, folder / "whole" / name)
    shutil.copy(artifact.golden_path, folder / "golden.safetensors")
    about = {"runtime": artifact.manifest["runtime"], "files": files, "signature": artifact.manifest["signature"]}
    (folder / "about.json").write_text(json.dumps(about))
    shutil.copytree(current(artifact.path), folder / "artifact-whole")


class Watch:
    """Notes what must not happen while it is armed."""

    def __init__(self, inside: Path, private: Path) -> None:
        self.armed, self.inside, self.private = False, str(inside), str(private)
        self.seen: list[str] = []
        sys.addaudithook(self.see)

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if self._is_private(args):
            return
        is_foreign = event.startswith(_FORBIDDEN)
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            # `verify` says which processor it ran on.
            is_foreign = args[0] != "/proc/cpuinfo" and not os.path.abspath(os.fsdecode(args[0])).startswith(
                self.inside
            )
            is_foreign |= bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if is_foreign:
            self.seen.append(f"{event} {args!r:.200}")

    def _is_private(self, args: tuple[Any, ...]) -> bool:
        """Tell whether an event is about the private copy that an artifact is read from."""
        if len(args) == 2 and isinstance(args[0], str) and isinstance(args[1], int) and args[1] > 0:
            # Removed by its name in an open folder.
            with contextlib.suppress(OSError):
                return os.readlink(f"/proc/self/fd/{args[1]}").startswith(self.private)
        return bool(args) and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(self.private)


def opened(folder: Path, what: str) -> Callable[..., None]:
    """Return what opens a case, and calls the model where it loads."""
    about = json.loads((folder / "about.json").read_text())
    runtime, signature = runtimes.get(about["runtime"]), Signature.from_dict(about["signature"])
    inputs = list(golden.load(folder / "golden.safetensors", signature).inputs)

    def open_files(case: Path, *, call: bool) -> None:
        model = runtime.load(case, about["files"], signature)
        if call:
            model.run(inputs)

    def open_folder(case: Path, *, call: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for arguments in (["report", "--max-drop", "x=1"], ["compare", "--min-speedup=1"], ["compare", "--json"]):
                cli.main([*arguments, "--max-size-ratio=1", "--max-accuracy-drop=1", str(case)])
        artifact = read(case)
        repr(artifact), artifact._repr_markdown_()
        if call:
            verify(case)
            load(case)(*inputs)
        else:
            load(case)

    return open_files if what == "files" else open_folder


def main(folder: Path, number: int, what: str) -> None:
    """Open each forged case and call those that load; print a line of JSON with what went wrong."""
    torch.set_num_threads(1)
    (private := folder / "private").mkdir()
    tempfile.tempdir = str(private)
    case, watch, open_case = folder / "case", Watch(folder / "case", private), opened(folder, what)
    about = json.loads((folder / "about.json").read_text())

    def attempt(seed: str, *, call: bool) -> list[str]:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(folder / ("whole" if what == "files" else "artifact-whole"), case)
        (case / "other.bin").write_bytes(b"\0" * 64)
        if seed != "whole" and what == "files":
            forge(case, about["files"], random.Random(seed))
        elif seed != "whole":
            forge_folder(case, random.Random(seed))
        watch.seen, watch.armed = [], seed.startswith("case")
        try:
            open_case(case, call=call)
        except QuantizationError:
            pass
        except BaseException:
            watch.armed = False
            return [traceback.format_exc(limit=-4)]
        finally:
            watch.armed = False
        return watch.seen

    foreign_files()
    # What is imported late, also by errors, is imported now.
    importlib.import_module("torch._subclasses.schema_check_mode")

    for seed in ("whole", *(f"first {index}" for index in range(12))):
        attempt(seed, call=True)
    attempt("whole", call=True)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, most))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def beside() -> dict[Path, int]:
        ours = (case, private)
        files = (path for path in folder.rglob("*") if not any(one in (path, *path.parents) for one in ours))
        return {path: path.stat().st_mtime_ns for path in files}

    around = beside()
    for call in (False, True):
        for index in range(number):
            print(json.dumps({"case": index, "call": call}), flush=True)
            for wrong in attempt(f"case {index}", call=call):
                print(json.dumps({"wrong": wrong}), flush=True)
        if not call:
            growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            print(json.dumps({"growth": growth}), flush=True)
    if around != beside():
        print(json.dumps({"wrong": "files beside the model have changed"}), flush=True)
    print(json.dumps({"done": number}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
