"""How one set of files replaces another in a folder at once, whatever ends the process meanwhile.

The files have plain names, the same for every artifact, so that what is built on them need not know its content. A new
version is staged as a folder inside, whole and with a manifest of its own. Renaming that folder to one fixed name is
the commit: from then on it is the artifact, for `current` and for every reader that asks it. Its files are then linked
to their names outside, and when all are there, the folder goes. A crash leaves the old artifact or the new one, and the
next commit finishes or removes what it left.
"""

import contextlib
import filecmp
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_quant.arguments.reading import parse_json, read_bytes
from lightning_quant.artifact.manifest import MANIFEST, MAX_BYTES, SIGNATURE_FILE, is_file_name, top_level
from lightning_quant.errors import ArtifactError, DiskError, NoEffectWarning

TEMPORARY = ".lightning_quant-"
"""How names of temporary files and folders begin."""
# The new version while its files are given their names.
_NEW = ".lightning_quant_new"
# Where locks do not work: what is older than this has been left by a crash.
_LONGEST_EXPORT_S = 24 * 3600
_LOCK_TRIES, _LOCK_WAIT_S = 600, 0.1


def current(path: Path) -> Path:
    """Return where the files of an artifact lie: in its folder, or in the version there whose commit is under way."""
    new = path / _NEW
    return new if os.path.exists(new / MANIFEST) else path


def version(path: Path) -> tuple[Path, int, int] | None:
    """Return what changes with every commit; None where nothing is."""
    where = current(path)
    try:
        status = os.lstat(where / MANIFEST)
    except (OSError, ValueError):
        return None
    return where, status.st_ino, status.st_mtime_ns


def commit(path: Path, staged: Path) -> None:
    """Let the files of a staged folder be the artifact, all at once; then remove what was ours besides.

    Args:
        path: the artifact's folder, `locked`.
        staged: from `staging(path)`; holds a manifest and the files that it names, and is gone afterwards.

    Raises:
        OSError: the old artifact stays.
        DiskError: the new one is there, and its files have no names in the folder yet.
    """
    for file in staged.iterdir():
        os.chmod(file, 0o644)
        with file.open("rb") as written:
            os.fsync(written.fileno())
    os.chmod(staged, 0o755)
    _sync_folder(staged)
    _settle(path)
    os.rename(staged, path / _NEW)
    _sync_folder(path)
    try:
        _settle(path)
    except OSError as error:
        raise DiskError(
            f"Expected {path} to take the names of the new artifact's files, but {error}. They are whole, and `load` "
            f"and `verify` open them: they lie in {_NEW} there until the next artifact is written. Make room there, "
            "and run this again."
        ) from error
    for entry in path.iterdir():
        if entry.name.startswith(TEMPORARY) and _is_abandoned(entry):
            _remove(entry)


def settle_and_write(path: Path, name: str, content: Callable[[bytes], bytes]) -> Path:
    """Write a file that depends on the manifest's bytes into the folder of an artifact, whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    try:
        with locked(path):
            _settle(path)
            temporary = path / f"{TEMPORARY}{name}"
            _remove(temporary)
            try:
                with temporary.open("xb") as file:
                    file.write(content(read_bytes(path / MANIFEST, MAX_BYTES)))
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, path / name)
            finally:
                _remove(temporary)
            _sync_folder(path)
    except OSError as error:
        raise DiskError(f"Expected {path} to take {name}, but {error}. Make room there.") from error
    return path / name


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        shutil.copyfile(source, target)
        with target.open("rb") as copy:
            os.fsync(copy.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep others from the same until the block ends, or the process, however that ends.

    Raises:
        ArtifactError: somebody else kept it for a minute.
    """
    for _ in range(_LOCK_TRIES):
        with _lock(path) as is_free:
            if is_free is not False:
                yield
                return
        time.sleep(_LOCK_WAIT_S)
    raise ArtifactError(
        f"Expected others to be done with {path} within a minute, but somebody is still writing to it. Give every run "
        "an `output_dir` of its own."
    )


def _settle(path: Path) -> None:
    """Give the files of a committed version their names in the folder; a crash before may have begun with it."""
    new = path / _NEW
    if not (new / MANIFEST).exists():
        _remove(new)
        return
    names, before = {file.name for file in new.iterdir()}, _named(path)
    # The old manifest goes last: while it stands, it tells which names are ours.
    for name in sorted(before - names):
        _remove(path / name)
    for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
        _rename_out(new / name, path / name, is_ours=name in before)
    _sync_folder(path)
    _remove(new)


def _rename_out(file: Path, target: Path, *, is_ours: bool) -> None:
    """Link a file of the new version to its name in the folder; what somebody else put there gets another name."""
    if target.is_file() and not target.is_symlink() and filecmp.cmp(file, target, shallow=False):
        return
    if os.path.lexists(target) and (target.is_dir() or not is_ours):
        kept = next(p for n in range(1, 10**6) if not os.path.lexists(p := target.with_name(f"{target.name}.kept{n}")))
        os.rename(target, kept)
        warnings.warn(
            f"{target} was no file of the artifact's: it is kept as {kept.name}.", NoEffectWarning, stacklevel=2
        )
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    try:
        _remove(temporary)
        link(file, temporary)
        os.replace(temporary, target)
    finally:
        _remove(temporary)


def _named(path: Path) -> set[str]:
    """Return the names in the folder that belong to the manifest that stands there, if only roughly."""
    try:
        files = parse_json(read_bytes(path / MANIFEST, MAX_BYTES))["files"]
        named = top_level({role: name for role, name in files.items() if is_file_name(name)})
    except (ValueError, KeyError, TypeError, AttributeError):
        named = set()
    return {*named, MANIFEST, SIGNATURE_FILE}


def _is_abandoned(entry: Path) -> bool:
    """Tell whether nobody works in a temporary folder any more; temporary files are made under the folder's lock."""
    if not entry.is_dir():
        return True
    with contextlib.suppress(OSError), _lock(entry) as is_free:
        old = time.time() - entry.stat().st_mtime > _LONGEST_EXPORT_S
        return old if is_free is None else is_free
    return False


def _remove(entry: Path) -> None:
    """Remove a leftover; one that cannot be removed harms nobody, and the next commit tries again."""
    with contextlib.suppress(OSError):
        if entry.is_dir() and not entry.is_symlink():
            # A folder that is half removed must still be known as ours.
            if not entry.name.startswith(TEMPORARY):
                temporary = entry.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
                os.rename(entry, temporary)
                entry = temporary
            shutil.rmtree(entry)
            return
        try:
            entry.unlink(missing_ok=True)
        except OSError:
            os.rename(entry, entry.with_name(f"{TEMPORARY}{uuid.uuid4().hex}"))


def _sync_folder(path: Path) -> None:
    """Make sure that the names in a folder are on disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _lock(path: Path) -> Iterator[bool | None]:
    """Lock a folder if nobody else has; tell whether that went well, None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        is_free: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError:  # Some network file systems have no locks.
            is_free = None
        yield is_free
        if is_free:
            # Closing is not enough: a process that was forked meanwhile has the descriptor, too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
