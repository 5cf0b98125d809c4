"""Who made an artifact: a signature over its manifest, which holds the hashes of all its files.

The signature is the file manifest.sig beside manifest.json: the 64 bytes of Ed25519 (RFC 8032) over the bytes of
manifest.json and nothing else, so that other tools check it as well:
`openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in manifest.json -sigfile manifest.sig`. Keys are files as
`openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them, or `ssh-keygen -t ed25519`.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_quant.arguments.reading import read_bytes
from lightning_quant.artifact.commit import settle_and_write
from lightning_quant.artifact.manifest import MANIFEST, SIGNATURE_FILE, parse
from lightning_quant.errors import ArtifactError, MissingRuntimeError, QuantizationError

if TYPE_CHECKING:
    from lightning_quant.artifact.stored import Artifact

Key = str | os.PathLike[str]
_SIGNATURE_BYTES = 64
_MAX_KEY_BYTES = 2**16


def sign(path: "str | os.PathLike[str] | Artifact", key: Key, *, password: bytes | None = None) -> Path:
    """Sign an artifact; adding a report or writing another artifact takes the signature away again.

    Args:
        path: the artifact's folder, or an artifact; its files are checked first.
        key: file of the private key, in PEM or as OpenSSH writes it.
        password: of that file.

    Returns:
        the file of the signature, manifest.sig in the artifact's folder.

    Raises:
        ArtifactError: the folder is no artifact, is damaged, has been replaced, or cannot be written.
        QuantizationError: the key is no private key of Ed25519.
        MissingRuntimeError: package cryptography is not installed.
    """
    from lightning_quant.artifact.stored import read, replaced

    private = _load_key(key, "private", password)
    artifact = read(path)

    def signature(manifest: bytes) -> bytes:
        if parse(manifest) != artifact.manifest:
            raise replaced(artifact.path)
        return private.sign(manifest)

    return settle_and_write(artifact.path, SIGNATURE_FILE, signature)


def check_signature(where: Path, manifest: bytes, key: Key) -> None:
    """Make sure that the bytes of a manifest were signed with the private key of a public one.

    Args:
        where: folder of the manifest and its signature.
        manifest: its bytes, as they are going to be used.
        key: file of the public key.

    Raises:
        ArtifactError: there is no signature, or it is another's or of another manifest.
        QuantizationError: the key is no public key of Ed25519.
        MissingRuntimeError: package cryptography is not installed.
    """
    public = _load_key(key, "public", None)
    from cryptography.exceptions import InvalidSignature

    try:
        signature = read_bytes(where / SIGNATURE_FILE, _SIGNATURE_BYTES)
    except ArtifactError as error:
        raise ArtifactError(f"Expected {where} to be signed, but {SIGNATURE_FILE} cannot be read: {error}") from error
    try:
        public.verify(signature, manifest)
    except InvalidSignature as error:
        raise ArtifactError(
            f"Expected {where / MANIFEST} to be signed with the key that belongs to {os.fspath(key)}, but it is not: "
            "it was changed, or signed with another key."
        ) from error


def _load_key(key: Key, kind: str, password: bytes | None) -> Any:
    if importlib.util.find_spec("cryptography") is None:
        raise MissingRuntimeError(
            "Expected package cryptography for signatures, but it is missing: pip install 'lightning_quant[signing]'"
        )
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    # Keys are the caller's own files, which may be links.
    data = read_bytes(Path(key).expanduser().resolve(), _MAX_KEY_BYTES)
    try:
        if kind == "private":
            is_openssh = b"OPENSSH PRIVATE KEY" in data
            load: Any = serialization.load_ssh_private_key if is_openssh else serialization.load_pem_private_key
            loaded: Any = load(data, password)
            wanted: Any = ed25519.Ed25519PrivateKey
        else:
            load = serialization.load_ssh_public_key if data.startswith(b"ssh-") else serialization.load_pem_public_key
            loaded, wanted = load(data), ed25519.Ed25519PublicKey
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise QuantizationError(
            f"Expected `key` to be the file of a {kind} key of Ed25519, but {os.fspath(key)} cannot be read as one: "
            f"{error}"
        ) from error
    if not isinstance(loaded, wanted):
        raise QuantizationError(
            f"Expected `key` to be the file of a {kind} key of Ed25519, but {os.fspath(key)} holds another kind. "
            "`openssl genpkey -algorithm ed25519` makes one."
        )
    return loaded
