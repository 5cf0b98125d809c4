"""An artifact's folder: what it is called, whose it is, and where in it new files are made."""

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_quant.arguments.reading import opened, parse_json, read_bytes
from lightning_quant.artifact.commit import TEMPORARY, current, locked
from lightning_quant.artifact.manifest import FORMAT_VERSION, MANIFEST, MAX_BYTES
from lightning_quant.errors import ArtifactError
from lightning_quant.machine.disk import lasting_scratch_folder, taking

SEARCH = "search.json"
"""What a search for an artifact has tried: it may lie in a folder before the artifact does."""


def output_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Return the one absolute path of a folder, however it was spelled: `~`, `..` and links are resolved.

    Raises:
        ArtifactError: it is no path that a folder can have.
    """
    try:
        path = Path(output_dir).expanduser().absolute()
        broken = next((p for p in (path, *path.parents) if p.is_symlink() and not p.exists()), None)
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"Expected `output_dir` to be the path of a folder, but got {output_dir!r}: {error}."
        ) from error
    if broken is not None:
        raise ArtifactError(f"Expected `output_dir` to be a folder, but {broken} is a link that leads nowhere.")
    return resolved


def check_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Make sure that an artifact can be written to a folder, and return its absolute path.

    It may be missing, empty, or ours: an artifact, a damaged one, or what a crash left of one. Files that are not ours
    beside an artifact are kept.

    Raises:
        ArtifactError: it holds something that is not an artifact, one of a newer format, or cannot be written.
    """
    path = output_folder(output_dir)
    try:
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        try:
            with _temporary(path) as folder:
                _check_ours(path)
                (folder / MANIFEST).touch()
        finally:
            for parent in missing:
                with contextlib.suppress(OSError):  # It was not made, or others are at work in it.
                    parent.rmdir()
    except (OSError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"Expected `output_dir` {path} to be a folder that can be written, but {error}.") from error
    return path


def fleeting_folder() -> Path:
    """Make a folder that is gone when the process ends.

    Raises:
        DiskError: there is no room for it.
    """
    folder = lasting_scratch_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def staging(path: Path, what: str = "the artifact") -> Iterator[Path]:
    """Offer a folder inside the artifact's to write files into; it is gone after the block.

    Args:
        path: the artifact's folder.
        what: is written, in words.

    Raises:
        DiskError: the disk is full, or something else keeps files from being written.
    """
    with taking(path, what), _temporary(path) as folder:
        yield folder


def is_free(path: Path) -> bool:
    """Tell whether a folder holds nothing but temporary files of ours."""
    return not _strangers(path) and not os.path.lexists(path / MANIFEST)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a regular file's content.

    Raises:
        ArtifactError: it is missing, something else, or cannot be read.
    """
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Make a temporary folder in a folder, and lock it: others remove those that nobody works in."""
    with contextlib.ExitStack() as stack:
        for is_last in [False] * 10 + [True]:
            try:
                path.mkdir(parents=True, exist_ok=True)
                with locked(path):
                    name = stack.enter_context(tempfile.TemporaryDirectory(dir=path, prefix=TEMPORARY))
                    stack.enter_context(locked(Path(name)))
                break
            except FileNotFoundError:  # Another process made the folder, too, and has removed it, since it was empty.
                if is_last:
                    raise
        yield Path(name)


def _check_ours(path: Path) -> None:
    if current(path) != path:
        return
    manifest = path / MANIFEST
    if not os.path.lexists(manifest):
        if strange := _strangers(path):
            raise ArtifactError(
                f"Expected `output_dir` to be empty or an artifact of ours, but {path} holds other files, such as "
                f"{strange[0]!r}. Choose another folder."
            )
        return
    try:
        content = parse_json(read_bytes(manifest, MAX_BYTES))
        version = content["format_version"] if {"sha256", "signature"} <= set(content) else None
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        raise ArtifactError(
            f"Expected {manifest} to be a manifest of lightning_quant, but it is something else or damaged. Choose "
            "another folder, or remove that file if it was an artifact."
        )
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"Expected an artifact of format {FORMAT_VERSION} or older in {path}, but it has format {version}: upgrade "
            "lightning_quant, or choose another folder."
        )


def _strangers(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if not name.startswith(TEMPORARY) and name != SEARCH)
