"""Loads and calls forged model files in a process of its own, under audit hooks and a limit of memory.

`python forged_run.py FOLDER NUMBER` prints what went wrong, with a folder that holds what `prepare_folder` wrote.
"""

import json
import os
import random
import resource
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from forged_files import foreign_files, forge

from lightning_quant.artifact import Artifact

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


class Watch:
    """Notes what must not happen while it is armed."""

    def __init__(self, inside: Path) -> None:
        self.armed, self.inside = False, str(inside)
        self.seen: list[str] = []
        sys.addaudithook(self.see)

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        is_foreign = event.startswith(_FORBIDDEN)
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            is_foreign = not os.path.abspath(os.fsdecode(args[0])).startswith(self.inside)
            is_foreign |= bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if is_foreign:
            self.seen.append(f"{event} {args!r:.200}")


def main(folder: Path, number: int) -> None:
    """Load each forged model and call those that load; print a line of JSON with what went wrong."""
    import torch

    from lightning_quant import golden, runtimes
    from lightning_quant.errors import QuantizationError
    from lightning_quant.signature import Signature

    torch.set_num_threads(1)
    about = json.loads((folder / "about.json").read_text())
    runtime, signature = runtimes.get(about["runtime"]), Signature.from_dict(about["signature"])
    inputs = list(golden.load(folder / "golden.safetensors", signature).inputs)
    case, watch = folder / "case", Watch(folder / "case")

    def attempt(seed: str, *, call: bool) -> list[str]:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(folder / "whole", case)
        (case / "other.bin").write_bytes(b"\0" * 64)
        if seed != "whole":
            forge(case, about["files"], random.Random(seed))
        watch.seen, watch.armed = [], seed.startswith("case")
        try:
            model = runtime.load(case, about["files"], signature)
            if call:
                model.run(inputs)
        except QuantizationError:
            pass
        except BaseException:
            watch.armed = False
            return [traceback.format_exc(limit=-4)]
        finally:
            watch.armed = False
        return watch.seen

    foreign_files()
    import torch._subclasses.schema_check_mode

    # What is imported late, also by errors, is imported now.
    for seed in ("whole", *(f"first {index}" for index in range(12))):
        attempt(seed, call=True)
    attempt("whole", call=True)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, most))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    around = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if case not in (path, *path.parents)}
    for call in (False, True):
        for index in range(number):
            print(json.dumps({"case": index, "call": call}), flush=True)
            for wrong in attempt(f"case {index}", call=call):
                print(json.dumps({"wrong": wrong}), flush=True)
        if not call:
            growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            print(json.dumps({"growth": growth}), flush=True)
    if around != {path: path.stat().st_mtime_ns for path in folder.rglob("*") if case not in (path, *path.parents)}:
        print(json.dumps({"wrong": "files beside the model have changed"}), flush=True)
    print(json.dumps({"done": number}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
