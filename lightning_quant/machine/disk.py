"""Files of our own on this machine: a folder for temporary ones, and what a disk refuses, with the way out."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_quant.errors import DiskError

_SCRATCH = "lightning_quant-"
# What a disk or its permissions refuse; a file that is missing is somebody else's fault.
_REFUSED = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "EMFILE", "ENFILE")
    if hasattr(errno, name)
}
# How native writers say it, whose errors have no number.
_IN_WORDS = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS))
_CHUNK = 2**20
_OTHER_SCRATCH = "Make room there, or let the environment variable TMPDIR name another folder."


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Offer a folder for temporary files; it is gone after the block.

    Raises:
        DiskError: there is no room for it or for what is written to it.
    """
    folder = lasting_scratch_folder()
    try:
        with taking(folder, "temporary files"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lasting_scratch_folder() -> Path:
    """Make a folder for temporary files, which the caller removes.

    Raises:
        DiskError: there is no room for it.
    """
    try:
        return Path(tempfile.mkdtemp(prefix=_SCRATCH)).resolve()
    except OSError as error:
        where = tempfile.tempdir or "a folder of the system"
        raise DiskError(f"Expected {where} to take temporary files, but {error}. {_OTHER_SCRATCH}") from error


@contextmanager
def taking(folder: Path, what: str) -> Iterator[None]:
    """Let what the disk refuses in a block be an error of ours; errors about the user's own files stay what they are.

    Args:
        folder: where the block writes, beside temporary files.
        what: is written, in words.

    Raises:
        DiskError: the disk is full, or something else keeps files from being written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_of_ours(error, folder):
            raise
        is_scratch = any(part.startswith(_SCRATCH) for part in folder.parts)
        way_out = _OTHER_SCRATCH if is_scratch else "Make room there, or choose another `output_dir`."
        raise DiskError(f"Expected {folder} to take {what}, but {error}. {way_out}") from error


def disk_refusal(error: BaseException) -> OSError | None:
    """Return the refusal of a disk that a writer's error comes from; None where it comes from something else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _REFUSED:
            return cause
        if any(words in str(cause) for words in _IN_WORDS):
            return OSError(str(cause).strip().splitlines()[0])
        cause = cause.__cause__ or getattr(cause, "inner_exception", None) or cause.__context__
    return None


def check_room(folder: Path, num_bytes: int) -> None:
    """Write bytes, and a mebibyte of text beside them, as a writer would that has failed without saying why.

    Raises:
        DiskError: the folder does not take them.
    """
    with taking(folder, "a model file"), tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
        for _ in range(0, num_bytes + _CHUNK, _CHUNK):
            if probe.write(bytes(_CHUNK)) < _CHUNK:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_of_ours(error: BaseException, folder: Path) -> bool:
    """Tell whether an error is about a file of ours; a writer does not always name it.

    Other temporary files may be the user's own: of these, what a disk refuses alone.
    """
    names = (getattr(error, attribute, None) for attribute in ("filename", "filename2"))
    named = [Path(name).resolve() for name in names if isinstance(name, str | os.PathLike)]
    if any(name.is_relative_to(folder.resolve()) for name in named):
        return True
    if named and not any(name.is_relative_to(_temporary()) for name in named):
        return False
    return not isinstance(error, OSError) or disk_refusal(error) is not None


def _temporary() -> Path:
    return Path(tempfile.gettempdir()).resolve()
