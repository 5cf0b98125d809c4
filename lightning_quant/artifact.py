"""Stage 6: the folder on disk: model file, manifest, report.

Model files carry their content's hash in their name. Replacing manifest.json is the commit: a crash before it leaves
the old artifact, a crash after it the new one. Hashes prove that files are whole, not where they come from.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant import runtimes
from lightning_quant.errors import ArtifactError
from lightning_quant.machine import cpu_name
from lightning_quant.signature import Signature

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_REPORTS = ("report.md", "report.json")
_PACKAGES = ("lightning_quant", "torch", "lightning", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Artifact:
    """A quantized model on disk.

    Attributes:
        path: the folder.
        manifest: what manifest.json says.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self.path / self.manifest["files"]["model"]

    @property
    def size_bytes(self) -> int:
        """Bytes of the model on disk, all its files together."""
        return sum((self.path / name).stat().st_size for name in self.manifest["files"].values())

    @property
    def plan(self) -> dict[str, Any]:
        """The plan that was carried out."""
        return self.manifest["plan"]

    @property
    def signature(self) -> Signature:
        """How the model is called."""
        return Signature.from_dict(self.manifest["signature"])

    @property
    def report(self) -> dict[str, Any] | None:
        """What was measured; None when nothing was."""
        return self.manifest.get("report")


def check_folder(path: Path) -> None:
    """Make sure that an artifact can be written to a folder.

    Raises:
        ArtifactError: it holds something that is not an artifact, or cannot be written.
    """
    path = path.absolute()
    if path.is_file():
        raise ArtifactError(f"Expected `output_dir` to be a folder, but {path} is a file.")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"Expected `output_dir` to be empty or an artifact of ours, but {path} holds other files. "
            "Choose another folder."
        )
    if path.is_dir() and (path / MANIFEST).is_file():
        read(path)
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ArtifactError(f"Expected `output_dir` {path} to be writable, but {error}.") from error


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Offer a folder inside the artifact's to write files into; it is gone after the block."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".staging-") as folder:
        yield Path(folder)


def write(path: Path, staged: Path, content: dict[str, Any]) -> Artifact:
    """Publish a staged model file, and files it refers to, with a manifest.

    Args:
        path: the artifact's folder.
        staged: the model file inside a staging folder; other files beside it keep their names.
        content: what the manifest says beyond files and versions.
    """
    digest = _hash(staged)
    name = f"{staged.stem}-{digest[:12]}{staged.suffix}"
    hashes, files = {name: digest}, {"model": name}
    for index, other in enumerate(sorted(file for file in staged.parent.iterdir() if file != staged)):
        hashes[other.name] = _hash(other)
        files[f"data_{index}"] = other.name
        os.replace(other, path / other.name)
    os.replace(staged, path / name)
    manifest = {
        "format_version": FORMAT_VERSION,
        **content,
        "files": files,
        "sha256": hashes,
        "versions": {package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "cpu": cpu_name(),
    }
    return _commit(path, manifest)


def add_report(artifact: Artifact, report: dict[str, Any], markdown: str) -> Artifact:
    """Add what was measured to an artifact: to its manifest and as report.md and report.json."""
    for name, text in zip(_REPORTS, (markdown, json.dumps(report, indent=2)), strict=True):
        _replace_text(artifact.path / name, text)
    return _commit(artifact.path, {**artifact.manifest, "report": report})


def read(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact's manifest and check its files.

    Raises:
        ArtifactError: it is no artifact, of a newer format, incomplete or damaged.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"Expected {folder} to hold an artifact, but its {MANIFEST} cannot be read: {error}."
        ) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format_version"), int):
        raise ArtifactError(
            f"Expected {folder / MANIFEST} to be a manifest of lightning_quant, but it is something else."
        )
    if manifest["format_version"] > FORMAT_VERSION:
        raise ArtifactError(
            f"Expected an artifact of format {FORMAT_VERSION} or older, but {folder} has format "
            f"{manifest['format_version']}: upgrade lightning_quant."
        )
    files, hashes = manifest.get("files"), manifest.get("sha256")
    if not isinstance(manifest.get("runtime"), str) or not isinstance(manifest.get("signature"), dict):
        raise ArtifactError(f"Expected {folder / MANIFEST} to name a runtime and a signature, but it does not.")
    if not isinstance(files, dict) or not isinstance(hashes, dict) or "model" not in files:
        raise ArtifactError(f"Expected {folder / MANIFEST} to name its files, but it does not.")
    for name in files.values():
        _check_file(folder, name, hashes.get(name))
    return Artifact(folder, manifest)


def load(path: str | os.PathLike[str], **runtime_options: Any) -> nn.Module:
    """Load an artifact as a module with the call signature of the captured one, without the user's code.

    Args:
        path: the artifact's folder.
        **runtime_options: what the artifact's runtime takes; `threads` and `providers` for "onnxruntime".

    Raises:
        ArtifactError: the folder is no artifact or is damaged.
        MissingRuntimeError: its runtime is not installed; the message carries the pip command.
    """
    artifact = read(path)
    runtime = runtimes.get(artifact.manifest["runtime"])
    return runtime.load(artifact.path, artifact.manifest["files"], artifact.signature, **runtime_options)


def _check_file(folder: Path, name: Any, expected: Any) -> None:
    if not isinstance(name, str) or Path(name).name != name:
        raise ArtifactError(f"Expected files of {folder} to lie inside it, but the manifest names {name!r}.")
    if not (folder / name).is_file():
        raise ArtifactError(f"Expected {folder} to be complete, but {name} is missing.")
    if _hash(folder / name) != expected:
        raise ArtifactError(f"Expected {folder / name} to be as it was written, but its content has changed.")


def _commit(path: Path, manifest: dict[str, Any]) -> Artifact:
    old = path / MANIFEST
    previous = set(read_names(old))
    _replace_text(old, json.dumps(manifest, indent=2))
    for name in previous - set(manifest["files"].values()):
        (path / name).unlink(missing_ok=True)
    for leftover in path.glob(".staging-*"):
        if not any(leftover.iterdir()):
            shutil.rmtree(leftover, ignore_errors=True)
    return Artifact(path, manifest)


def read_names(manifest: Path) -> list[str]:
    """Return the names of the files in a manifest, none when there is no readable one."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [name for name in files if isinstance(name, str) and Path(name).name == name]


def _replace_text(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
