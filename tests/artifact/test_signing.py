import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from test_folder import ONE, TWO, named, names, publish

from lightning_quant import load, sign, verify
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact import stored
from lightning_quant.artifact.artifact import private_copy, read
from lightning_quant.artifact.manifest import dump
from lightning_quant.cli import cli
from lightning_quant.errors import ArtifactError, MissingRuntimeError, QuantizationError

PRIVATE = {"pem": serialization.PrivateFormat.PKCS8, "ssh": serialization.PrivateFormat.OpenSSH}
PUBLIC = {
    "pem": (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    "ssh": (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH),
}


def write_keys(folder: Path, name: str, form: str = "pem", private: Any = None, password: bytes | None = None) -> None:
    private = private or ed25519.Ed25519PrivateKey.generate()
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / name).write_bytes(private.private_bytes(serialization.Encoding.PEM, PRIVATE[form], lock))
    (folder / f"{name}.pub").write_bytes(private.public_key().public_bytes(*PUBLIC[form]))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    folder.mkdir()
    write_keys(folder, "mine")
    write_keys(folder, "other")
    return folder


@pytest.mark.parametrize("form", ["pem", "ssh"])
def test_what_was_signed_is_taken_and_nothing_else(form: str, tmp_path: Path) -> None:
    write_keys(tmp_path, "key", form)
    artifact = publish(tmp_path / "a", ONE, report=True)
    with pytest.raises(ArtifactError, match=r"to be signed, but manifest\.sig cannot be read"):
        load(artifact, key=tmp_path / "key.pub")
    assert sign(artifact, tmp_path / "key") == artifact.path / "manifest.sig"
    assert len((artifact.path / "manifest.sig").read_bytes()) == 64
    with private_copy(artifact, tmp_path / "key.pub") as own:
        assert own.manifest == artifact.manifest


def test_signature_is_one_that_other_tools_check(keys: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    artifact = publish(tmp_path / "a", ONE)
    sign(artifact, keys / "mine")
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys / "mine.pub"), "-rawin"]
    command += ["-in", "manifest.json", "-sigfile", "manifest.sig"]
    ran = subprocess.run(command, cwd=artifact.path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def _forged_manifest(folder: Path, keys: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(dump({**manifest, "outside": "something else"})[0])


def _one_blank_more(folder: Path, keys: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + " ")


def _signed_by_another(folder: Path, keys: Path) -> None:
    sign(folder, keys / "other")


def _signature_of_another_artifact(folder: Path, keys: Path) -> None:
    other = publish(folder.parent / "b", TWO)
    shutil.copy(sign(other, keys / "mine"), folder)


def _no_signature(folder: Path, keys: Path) -> None:
    (folder / "manifest.sig").write_bytes(b"")


def _long_signature(folder: Path, keys: Path) -> None:
    (folder / "manifest.sig").write_bytes((folder / "manifest.sig").read_bytes() + b"0")


def _linked_signature(folder: Path, keys: Path) -> None:
    (folder / "manifest.sig").rename(folder.parent / "sig")
    (folder / "manifest.sig").symlink_to(folder.parent / "sig")


FORGERIES = [_forged_manifest, _one_blank_more, _signed_by_another, _signature_of_another_artifact, _no_signature]


@pytest.mark.parametrize("forge", [*FORGERIES, _long_signature, _linked_signature])
def test_what_was_not_signed_so_is_refused_before_it_is_read(
    forge: Callable[[Path, Path], None], keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(tmp_path / "a", ONE).path
    sign(folder, keys / "mine")
    forge(folder, keys)
    monkeypatch.setattr(stored, "parse", lambda *_: pytest.fail("it was read"))
    for reader in (load, verify):
        with pytest.raises(ArtifactError, match="to be signed"):
            reader(folder, key=keys / "mine.pub")


def test_files_of_a_signed_artifact_are_covered(keys: Path, tmp_path: Path) -> None:
    artifact = publish(tmp_path / "a", ONE)
    sign(artifact, keys / "mine")
    artifact.model_path.write_bytes(b"One")
    with pytest.raises(ArtifactError, match="content has changed"):
        load(artifact, key=keys / "mine.pub")
    with pytest.raises(ArtifactError, match="content has changed"):
        sign(artifact, keys / "mine")


def test_a_signature_goes_with_the_manifest_that_it_was_made_for(keys: Path, tmp_path: Path) -> None:
    artifact = publish(tmp_path / "a", ONE)
    sign(artifact, keys / "mine")
    artifact = artifacts.add_report(artifact, {"a": 1}, "# Report")
    assert names(artifact.path) == named(artifact)
    sign(artifact, keys / "mine")
    sign(artifact, keys / "mine")
    other = publish(tmp_path / "a", TWO)
    assert names(other.path) == named(other)
    with pytest.raises(ArtifactError, match="another run has replaced it"):
        sign(artifact, keys / "mine")
    assert read(other).manifest == other.manifest


def test_keys_that_are_none_are_refused(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = publish(tmp_path / "a", ONE)
    write_keys(keys, "curve", private=ec.generate_private_key(ec.SECP256R1()))
    write_keys(keys, "locked", password=b"open")
    (keys / "text").write_text("no key")
    for name in ("curve", "locked", "text", "mine.pub", "nowhere"):
        with pytest.raises(QuantizationError, match=r"private key of Ed25519|nowhere to be a file"):
            sign(artifact, keys / name)
    assert sign(artifact, keys / "locked", password=b"open").is_file()
    for name in ("curve.pub", "text", "mine", "nowhere"):
        with pytest.raises(QuantizationError, match=r"public key of Ed25519|nowhere to be a file"):
            load(artifact, key=keys / name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(MissingRuntimeError, match=r"pip install 'lightning_quant\[signing\]'"):
        sign(artifact, keys / "mine")


def test_from_the_command_line(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(publish(tmp_path / "a", ONE).path)
    assert cli.main(["sign", folder, "--key", str(keys / "mine")]) == 0
    assert "manifest.sig" in capsys.readouterr().out
    assert cli.main(["verify", folder, "--key", str(keys / "other.pub")]) == 2
    assert "signed with another key" in capsys.readouterr().err
