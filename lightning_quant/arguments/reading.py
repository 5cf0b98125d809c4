"""Reading files that somebody else may have made: regular ones only, opened once, within stated bounds.

A name can be a pipe, a device or a link, a small file can unpack to gigabytes, and what was checked under a name can be
swapped before it is opened again. So whatever is read of an artifact is read here: into memory, or into a copy that
nobody else can reach, with its hash taken on the way.
"""

import errno
import gzip
import hashlib
import io
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lightning_quant.errors import ArtifactError

MAX_JSON_BYTES = 64 * 2**20
"""Longest text of JSON that is read; with `_MAX_CONTAINERS` it holds what reading takes below a gigabyte."""
_MAX_CONTAINERS = 2**20
_CHUNK = 2**20
# Absent on Windows, where there are neither pipes nor devices among files.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; neither a link, nor a pipe or device, is opened.

    Raises:
        ArtifactError: it is missing or something else, or cannot be read.
    """
    try:
        _check_regular(path, os.lstat(path))
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        with open(descriptor, "rb") as file:
            _check_regular(path, os.fstat(descriptor))
            yield file
    except (OSError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOENT:
            raise ArtifactError(f"Expected {path} to be a file, but it is missing.") from error
        raise ArtifactError(f"Expected {path} to be a file that can be read, but {error}.") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Return a file's content.

    Args:
        path: of a regular file.
        limit: bytes that it may have.

    Raises:
        ArtifactError: it has more, is missing or something else, or cannot be read.
    """
    with opened(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ArtifactError(f"Expected {path} to have at most {limit:,} bytes, but it has more.")
    return data


def gunzip(data: bytes, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return what gzip data unpacks to, and never hold more than the limit of it.

    Raises:
        ArtifactError: it unpacks to more bytes than the limit, or is no gzip data.
    """
    try:
        with gzip.open(io.BytesIO(data)) as file:
            unpacked = file.read(limit + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ArtifactError(f"Expected compressed data, but {error}.") from error
    if len(unpacked) > limit:
        raise ArtifactError(f"Expected at most {limit:,} bytes of compressed data, but it unpacks to more.")
    return unpacked


def parse_json(data: bytes | str, limit: int = MAX_JSON_BYTES) -> Any:
    """Return what JSON says, read strictly.

    Args:
        data: UTF-8.
        limit: bytes that it may have.

    Raises:
        ArtifactError: it is longer or nested deeper than fits, has too many lists and objects, two values under one
            key, a number that JSON does not have, or is no JSON.
    """
    try:
        text = data.encode() if isinstance(data, str) else data
        if len(text) > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        if text.count(b"[") + text.count(b"{") > _MAX_CONTAINERS:
            raise ValueError(f"it has more than {_MAX_CONTAINERS:,} lists and objects")
        return json.loads(
            text.decode(),
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_repetitions,
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"Expected JSON, but {error}.") from error


def copy_hashed(path: Path, target: Path) -> str:
    """Copy a regular file and return the SHA-256 of what was copied.

    Raises:
        ArtifactError: it is missing or something else, or there is no space for the copy.
    """
    digest = hashlib.sha256()
    with opened(path) as source:
        try:
            with target.open("xb") as copy:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    copy.write(chunk)
        except OSError as error:
            raise ArtifactError(
                f"Expected space for a copy of {path} in {target.parent}, but {error}. The environment variable TMPDIR "
                "names another place."
            ) from error
    return digest.hexdigest()


def _check_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ArtifactError(f"Expected {path} to be a file of its own, but it is a link.")
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"Expected {path} to be a regular file, but it is a folder, a pipe or a device.")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name:.20} is no number of JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        _refuse_constant(text)
    return value


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has two values under {repeated!r:.80}")
    return values
