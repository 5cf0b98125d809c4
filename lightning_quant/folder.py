"""An artifact's folder: whose it is, who writes to it, and how one set of files replaces another at once."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_quant.errors import ArtifactError
from lightning_quant.manifest import DIGEST_CHARACTERS, FORMAT_VERSION, MANIFEST, parse, set_digest, short, top_level

_TEMPORARY = ".lightning_quant-"
_HASHED = re.compile(rf".+-([0-9a-f]{{{DIGEST_CHARACTERS}}})(\.\w+)?")


def check_folder(path: Path) -> None:
    """Make sure that an artifact can be written to a folder.

    It may be missing, empty, or ours: an artifact, a damaged one, or what a crash left of one. Files that are not ours
    beside an artifact are kept.

    Raises:
        ArtifactError: it holds something that is not an artifact, one of a newer format, or cannot be written.
    """
    path = path.absolute()
    if path.is_file():
        raise ArtifactError(f"Expected `output_dir` to be a folder, but {path} is a file.")
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        if path.is_dir():
            _check_ours(path)
        with tempfile.NamedTemporaryFile(dir=existing, prefix=_TEMPORARY):
            pass
    except OSError as error:
        raise ArtifactError(f"Expected `output_dir` {path} to be writable, but {error}.") from error


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Offer a folder inside the artifact's to write files into; it is gone after the block.

    Raises:
        ArtifactError: somebody else is writing an artifact there.
    """
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path), tempfile.TemporaryDirectory(dir=path, prefix=_TEMPORARY) as folder:
        yield Path(folder)


def publish(staged: Path, path: Path, digest: str) -> str:
    """Move a staged file, or a folder of files, into the artifact's folder, safe on disk first.

    Args:
        staged: in a staging folder.
        path: the artifact's folder.
        digest: of the file, or `set_digest` of the folder's files.

    Returns:
        its name there, with the digest in it.
    """
    name = f"{staged.stem}-{short(digest)}{staged.suffix}"
    inside = sorted(staged.iterdir()) if staged.is_dir() else []
    for file in inside or [staged]:
        os.chmod(file, 0o644)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if inside and (path / name).is_dir():
        # The same content again: a folder that is not empty cannot be replaced at once, its files can, by equal ones.
        for file in inside:
            os.replace(file, path / name / file.name)
    else:
        os.replace(staged, path / name)
    return name


def commit(path: Path, manifest: str, keep: set[str]) -> None:
    """Replace the manifest, and with it the artifact; then remove what was ours and is not to be kept.

    Args:
        path: the artifact's folder, in which all files lie already.
        manifest: text of the new manifest.
        keep: names of the files and folders that it names.
    """
    _sync_folder(path)
    before = _named(path)
    with tempfile.NamedTemporaryFile("w", dir=path, prefix=_TEMPORARY, delete=False, encoding="utf-8") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path / MANIFEST)
    _sync_folder(path)
    for entry in path.iterdir():
        if entry.name not in keep and (entry.name in before or _is_ours(entry)):
            _remove(entry)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_ours(path: Path) -> None:
    manifest = path / MANIFEST
    if not manifest.exists():
        strange = sorted(entry.name for entry in path.iterdir() if not _is_ours(entry))
        if strange:
            raise ArtifactError(
                f"Expected `output_dir` to be empty or an artifact of ours, but {path} holds other files, such as "
                f"{strange[0]!r}. Choose another folder."
            )
        return
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        version = found["format_version"] if {"sha256", "signature"} <= set(found) else None
    except (ValueError, KeyError, TypeError, RecursionError):
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


def _named(path: Path) -> set[str]:
    """Return the names of files and folders in the manifest that stands there; none when there is no whole one."""
    try:
        manifest = parse((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return top_level(manifest["files"])


def _is_ours(entry: Path) -> bool:
    """Tell whether an entry is one of ours that no manifest need name: temporary, or named after its content."""
    if entry.name.startswith(_TEMPORARY):
        return True
    match = _HASHED.fullmatch(entry.name)
    if match is None or entry.is_symlink():
        return False
    inside = list(entry.iterdir()) if entry.is_dir() else [entry]
    if not inside or not all(file.is_file() for file in inside):
        return False
    return short(set_digest(map(hash_file, inside))) == match[1]


def _remove(entry: Path) -> None:
    """Remove a leftover; one that cannot be removed harms nobody, and the next commit tries again."""
    with contextlib.suppress(OSError):
        if entry.is_dir():
            # A folder that is half removed must still be known as ours.
            temporary = entry.with_name(f"{_TEMPORARY}{entry.name.removeprefix(_TEMPORARY)}")
            os.replace(entry, temporary)
            shutil.rmtree(temporary)
        else:
            entry.unlink()


def _sync_folder(path: Path) -> None:
    """Make sure that the names in a folder are on disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep others from writing here; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ArtifactError(
            f"Expected nobody else to be writing to {path}, but somebody is. Give every run an `output_dir` of its own."
        ) from None
    except OSError:
        pass  # Some network file systems have no locks.
    try:
        yield
    finally:
        os.close(descriptor)
