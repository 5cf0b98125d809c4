"""An artifact as it lies on disk, checked and loaded.

What is loaded is a private copy, hashed while it was made: files that change between check and use, or that no hash
covers, are never opened by a runtime.
"""

import html
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_quant import runtimes
from lightning_quant.arguments.reading import copy_hashed, read_bytes
from lightning_quant.artifact import golden
from lightning_quant.artifact.commit import current, locked, version
from lightning_quant.artifact.folder import hash_file
from lightning_quant.artifact.manifest import (
    BESIDE_MODEL,
    GOLDEN,
    MANIFEST,
    MAX_BYTES,
    MODEL,
    REPORT_HTML,
    REPORT_MD,
    is_same_model,
    parse,
)
from lightning_quant.artifact.signing import Key, check_signature
from lightning_quant.calls.loaded import LoadedModule, Origin, into_how
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError, QuantizationError
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.terminal.tables import one_line

# How often a reader begins anew when another version came between.
_TRIES = 20


@dataclass(frozen=True)
class Artifact:
    """A quantized model on disk.

    Attributes:
        path: the folder.
        manifest: what manifest.json says.
    """

    path: Path
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        """Return one line; the report is in `report`, and in a notebook it is what a cell shows."""
        ratio = (self.report or {}).get("size_ratio")
        size = f"{self.size_bytes:,} bytes" if self.model_path.is_file() else "no longer in its folder"
        size += f", {ratio:.2f} of float" if isinstance(ratio, float) else ""
        warned = len((self.report or {}).get("warnings", []))
        warnings = f", {warned} warning{'s' * (warned != 1)}" if warned else ""
        return (
            f"Artifact({str(self.path)!r}: {self.manifest['recipe']} on {self.manifest['runtime']}, {size}{warnings})"
        )

    def _repr_markdown_(self) -> str:
        written = self.report_path
        return (
            written.read_text(encoding="utf-8") if written is not None and written.is_file() else one_line(repr(self))
        )

    def _repr_html_(self) -> str | None:
        """Return the report's page for a notebook, shut in a frame of its own; None where there is no page."""
        name = self.manifest["files"].get(REPORT_HTML)
        page = None if name is None else current(self.path) / name
        if page is None or not page.is_file():
            return None
        text = html.escape(page.read_text(encoding="utf-8"))
        return (
            f'<iframe sandbox="allow-scripts" style="width: 100%; height: 40rem; border: 0" srcdoc="{text}"></iframe>'
        )

    @property
    def model_path(self) -> Path:
        """The model file; of several, the one that is opened."""
        return current(self.path) / self.model_files[MODEL]

    @property
    def model_files(self) -> dict[str, str]:
        """Role to name of the model's files."""
        return {role: name for role, name in self.manifest["files"].items() if role not in BESIDE_MODEL}

    @property
    def golden_path(self) -> Path:
        """The golden batch: up to four real samples with the outputs of the float model and of the artifact."""
        return current(self.path) / self.manifest["files"][GOLDEN]

    @property
    def report_path(self) -> Path | None:
        """The report as Markdown; None when nothing was measured."""
        name = self.manifest["files"].get(REPORT_MD)
        return None if name is None else current(self.path) / name

    @property
    def model_digest(self) -> str:
        """What tells the model files of two artifacts apart."""
        hashes = self.manifest["sha256"]
        return " ".join(hashes[name] for _, name in sorted(self.model_files.items()))

    @property
    def size_bytes(self) -> int:
        """Bytes of the model on disk, all its files together; golden batch and report do not count."""
        return sum((current(self.path) / name).stat().st_size for name in self.model_files.values())

    @property
    def plan(self) -> dict[str, Any]:
        """The plan that was carried out."""
        return self.manifest["plan"]

    @property
    def signature(self) -> Signature:
        """How the model is called."""
        return Signature.from_dict(self.manifest["signature"])

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Labels of the classes, in the order of the scores; None when they were not known."""
        labels = self.manifest.get("classes")
        return None if labels is None else tuple(labels)

    @property
    def report(self) -> dict[str, Any] | None:
        """What was measured; None when nothing was."""
        return self.manifest.get("report")


def read(path: str | os.PathLike[str] | Artifact) -> Artifact:
    """Read an artifact's manifest and check its files.

    Args:
        path: the artifact's folder, or an artifact, which must still be the one in its folder.

    Raises:
        ArtifactError: it is no artifact, of a newer format, incomplete, damaged, or has been replaced.
    """
    return _taking(path, _check_files)


@contextmanager
def private_copy(path: str | os.PathLike[str] | Artifact, key: Key | None = None) -> Iterator[Artifact]:
    """Offer a checked copy of an artifact in a folder that nobody else writes to; it is gone after the block.

    Args:
        path: as for `read`.
        key: file of the public key that the manifest must be signed with; nothing else is looked at before.

    Raises:
        ArtifactError: as for `read`, it is not signed so, or there is no space for the copy.
    """
    with scratch_folder() as folder:
        taken = _taking(path, lambda artifact, where: _copy_files(artifact, where, folder), key)
        try:
            yield Artifact(folder, taken.manifest)
        except QuantizationError as error:
            # The reader knows the folder that was named.
            raise type(error)(str(error).replace(str(folder), str(taken.path))) from error


def load(path: str | os.PathLike[str] | Artifact, *, key: Key | None = None, **runtime_options: Any) -> LoadedModule:
    """Load an artifact as a module with the call signature of the captured one, without the user's code.

    Nothing is unpickled, and every file's hash is checked, which proves that it is whole and not where it comes from:
    .pt2 and .pte files (runtimes "inductor" and "executorch") run native code, so load those only from whom you trust.

    Args:
        path: the artifact's folder, or an artifact, which must still be the one in its folder.
        key: file of a public key: what was not signed with its private key (see `sign`) is refused, unread.
        **runtime_options: what the artifact's runtime takes; `threads` and `providers` for "onnxruntime".

    Raises:
        ArtifactError: the folder is no artifact, is damaged, or holds another one than was given.
        MissingRuntimeError: its runtime is not installed; the message carries the pip command.
    """
    with private_copy(path, key) as own:
        module = open_model(own, **runtime_options)
    if isinstance(module, LoadedModule):
        hashes = tuple(own.manifest["sha256"][name] for name in own.model_files.values())
        module.origin = Origin(str(_folder_of(path).absolute()), hashes, runtime_options)
    return module


def open_model(own: Artifact, **runtime_options: Any) -> LoadedModule:
    """Load the model of a private copy.

    Raises:
        ArtifactError: it has no program, and there is no module to fill.
    """
    runtime = runtimes.get(own.manifest["runtime"])
    runtimes.check_options(own.manifest["runtime"], runtime_options)
    if "into_only" in own.manifest and runtime_options.get("into") is None:
        raise ArtifactError(
            f"Expected `into` to be the float module that {own.path} was made of, built by its own code, but got none: "
            f"this artifact has no program of its own. Type {into_how(own.plan)}. Why: {own.manifest['into_only']}."
        )
    return runtime.load(own.path, own.model_files, own.signature, **runtime_options)


def _folder_of(path: str | os.PathLike[str] | Artifact) -> Path:
    if isinstance(path, Artifact):
        return path.path
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError) as error:
        raise ArtifactError(
            f"Expected an artifact or the path of its folder, but got {path!r:.80}: {error}."
        ) from error


def _taking(
    path: str | os.PathLike[str] | Artifact, take: Callable[[Artifact, Path], None], key: Key | None = None
) -> Artifact:
    """Read a manifest and take the files that it names; begin anew where another version came between.

    The last time no other is let come: a reader that the system starves can be too slow for a busy writer each time.
    """
    folder = _folder_of(path)
    for tries_left in reversed(range(_TRIES)):
        before = version(folder)
        try:
            with nullcontext() if tries_left else locked(folder):
                where = current(folder)
                artifact = _read_manifest(folder, where, key)
                if isinstance(path, Artifact) and not is_same_model(artifact.manifest, path.manifest):
                    raise replaced(folder)
                take(artifact, where)
        except ArtifactError:
            if not tries_left or version(folder) == before:
                raise
        else:
            return artifact
    raise AssertionError


def _read_manifest(folder: Path, where: Path, key: Key | None) -> Artifact:
    try:
        text = read_bytes(where / MANIFEST, MAX_BYTES)
    except ArtifactError as error:
        if folder.is_file():
            is_inside = (folder.parent / MANIFEST).is_file()
            hint = f" Give the folder that it is in, {folder.parent}." if is_inside else ""
            raise ArtifactError(f"Expected an artifact, which is a folder, but {folder} is a file.{hint}") from error
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST}"))
        hint = f" Below it are artifacts: give {' or '.join(inside[:3])}." if inside else ""
        raise ArtifactError(
            f"Expected {folder} to hold an artifact, but its {MANIFEST} cannot be read: {error}{hint}"
        ) from error
    if key is not None:
        check_signature(where, text, key)
    try:
        return Artifact(folder, parse(text))
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from error


def _check_files(artifact: Artifact, where: Path) -> None:
    _compare_hashes(artifact, where, hash_file)
    golden.check_belongs(where / artifact.manifest["files"][GOLDEN], artifact.manifest)


def _copy_files(artifact: Artifact, where: Path, folder: Path) -> None:
    for leftover in folder.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def copy(path: Path) -> str:
        target = folder / path.relative_to(where)
        target.parent.mkdir(exist_ok=True)
        return copy_hashed(path, target)

    _compare_hashes(artifact, where, copy)
    golden.check_belongs(folder / artifact.manifest["files"][GOLDEN], artifact.manifest)


def _compare_hashes(artifact: Artifact, where: Path, hash_of: Callable[[Path], str]) -> None:
    for name, expected in artifact.manifest["sha256"].items():
        path = where / name
        if path.parent != where and path.parent.is_symlink():
            raise ArtifactError(f"Expected files of {where} to lie inside it, but {path.parent.name} is a link.")
        if hash_of(path) != expected:
            raise ArtifactError(f"Expected {path} to be as it was written, but its content has changed.")


def replaced(path: Path) -> ArtifactError:
    """Return the error for a folder that holds another artifact than it did."""
    return ArtifactError(
        f"Expected {path} to hold this artifact still, but another run has replaced it: give every run an `output_dir` "
        "of its own."
    )
