import gzip
import hashlib
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lightning_quant.arguments import reading
from lightning_quant.arguments.reading import copy_hashed, gunzip, parse_json, read_bytes
from lightning_quant.errors import ArtifactError


def test_a_regular_file_is_read_and_copied_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content" * 500_000)
    digest = hashlib.sha256(b"content" * 500_000).hexdigest()

    assert read_bytes(tmp_path / "a", 10**7) == b"content" * 500_000
    assert copy_hashed(tmp_path / "a", tmp_path / "b") == digest
    assert (tmp_path / "b").read_bytes() == b"content" * 500_000


@pytest.mark.parametrize("kind", ["link", "dangling link", "link to a device", "pipe", "folder", "missing"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    (tmp_path / "real").write_bytes(b"1")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to({"link": tmp_path / "real", "dangling link": "nowhere", "link to a device": "/dev/zero"}[kind])
    with pytest.raises(ArtifactError, match=r"a link|regular file|missing"):
        read_bytes(path, 100)
    with pytest.raises(ArtifactError, match=r"a link|regular file|missing"):
        copy_hashed(path, tmp_path / "copy")


def test_a_pipe_that_takes_a_files_place_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a", os.open
    path.write_bytes(b"1")

    def swap(name: Any, *args: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, *args)

    monkeypatch.setattr(reading.os, "open", swap)
    with pytest.raises(ArtifactError, match="regular file"):
        read_bytes(path, 100)


def test_files_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ArtifactError, match="at most 1,000 bytes"):
        read_bytes(path, 1000)
    path.write_bytes(b"0" * 1000)
    assert len(read_bytes(path, 1000)) == 1000


def test_no_space_for_a_copy_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0" * 2**20)
    with pytest.raises(ArtifactError, match=r"space for a copy .* TMPDIR"):
        copy_hashed(tmp_path / "a", Path("/dev/full"))
    with pytest.raises(ArtifactError, match="space for a copy"):
        copy_hashed(tmp_path / "a", tmp_path / "nowhere" / "b")


def test_compressed_data_is_unpacked_up_to_the_limit_and_no_further() -> None:
    packed = gzip.compress(b" " * 2**26)
    assert gunzip(gzip.compress(b"text")) == b"text"
    assert gunzip(gzip.compress(b"1234"), 4) == b"1234"
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="unpacks to more"):
        gunzip(packed, 2**20)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    # Without the time of day, which would name the tests otherwise in each process.
    [
        b"no gzip",
        gzip.compress(b"x", mtime=0)[:-4],
        gzip.compress(b"x" * 100, mtime=0)[:15],
        b"\x1f\x8b" + b"\xff" * 50,
    ],
)
def test_data_that_is_not_compressed_is_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="compressed data"):
        gunzip(data)


def test_json_is_read_as_it_is_written() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "ü"], "b": {"a": 1}}') == {
        "a": [1, 2.5, None, True, "ü"],
        "b": {"a": 1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "two values under 'a'"),
        ('{"x": [{"a": 1, "b": 2, "a": 3}]}', "two values under 'a'"),
        ("NaN", "no number of JSON"),
        ("[-Infinity]", "no number of JSON"),
        ("-1e999", "no number of JSON"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
        ("9" * 5000, "digit"),
        ("[" + "[]," * 2**20 + "[]]", "lists and objects"),
        (b"\xff\xfe", "decode"),
        ("", "Expecting value"),
        ("\ud800", "surrogates"),
    ],
)
def test_json_that_is_ambiguous_or_boundless_is_refused(text: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"Expected JSON, but .*{message}"):
        parse_json(text)
    with pytest.raises(ArtifactError, match="more than 10 bytes"):
        parse_json('["0123456789"]', 10)
