"""Stage 6: the folder on disk: model files, manifest, golden batch, report.

Every file but manifest.json carries the hash of its content in its name; a model of several files is a folder with such
a name. Replacing manifest.json is the commit: a crash before it leaves the old artifact, a crash after it the new one,
and what no manifest names is removed by the next commit. Hashes prove that files are whole, not where they come from:
formats with native code (.pt2, .pte) run it when loaded, so load only what you trust.
"""

import json
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_quant import golden, runtimes
from lightning_quant.errors import ArtifactError
from lightning_quant.folder import check_folder, commit, hash_file, publish, staging
from lightning_quant.loaded import LoadedModule, Origin
from lightning_quant.machine import cpu_name
from lightning_quant.manifest import (
    BESIDE_MODEL,
    FORMAT_VERSION,
    GOLDEN,
    MANIFEST,
    MODEL,
    REPORT_JSON,
    REPORT_MD,
    dump,
    parse,
    set_digest,
    top_level,
)
from lightning_quant.signature import Signature

__all__ = ["Artifact", "add_report", "check_folder", "load", "read", "staging", "write"]
_PACKAGES = ("lightning_quant", "torch", "lightning", "safetensors")


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
        """The model file; of several, the one that is opened."""
        return self.path / self.model_files[MODEL]

    @property
    def model_files(self) -> dict[str, str]:
        """Role to name of the model's files."""
        return {role: name for role, name in self.manifest["files"].items() if role not in BESIDE_MODEL}

    @property
    def golden_path(self) -> Path:
        """The golden batch: up to four real samples with the outputs of the float model and of the artifact."""
        return self.path / self.manifest["files"][GOLDEN]

    @property
    def report_path(self) -> Path | None:
        """The report as Markdown; None when nothing was measured."""
        name = self.manifest["files"].get(REPORT_MD)
        return None if name is None else self.path / name

    @property
    def size_bytes(self) -> int:
        """Bytes of the model on disk, all its files together; golden batch and report do not count."""
        return sum((self.path / name).stat().st_size for name in self.model_files.values())

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


def write(path: Path, staged: Path, content: dict[str, Any]) -> Artifact:
    """Publish what lies in a staging folder as an artifact.

    Args:
        path: the artifact's folder.
        staged: the model file inside a staging folder; beside it the golden batch as `golden.FILE`, and all other files
            are further files of the model.
        content: what the manifest says beyond files and versions: recipe, runtime, signature, plan, what stays outside,
            and classes when known.
    """
    files, hashes = _publish_model(staged, path)
    files[GOLDEN] = _publish_file(staged.parent / golden.FILE, path, hashes)
    requires = runtimes.get(content["runtime"]).REQUIRES
    return _commit(
        path,
        {
            "format_version": FORMAT_VERSION,
            **content,
            "files": files,
            "sha256": hashes,
            "versions": {package: _version(package) for package in dict.fromkeys((*_PACKAGES, *requires))},
            "python": platform.python_version(),
            "cpu": cpu_name(),
        },
    )


def add_report(artifact: Artifact, report: dict[str, Any], markdown: str) -> Artifact:
    """Add what was measured to an artifact: to its manifest and as report.md and report.json beside the model.

    report.md ends with the lines that run the model without this package.
    """
    runtime = runtimes.get(artifact.manifest["runtime"])
    standalone = runtime.standalone(artifact.model_files, artifact.signature)
    markdown = (
        f"{markdown.rstrip()}\n\n## What stays outside\n\n{artifact.manifest['outside']}\n\n"
        f"## Run it without lightning_quant, in this folder\n\n```python\n{standalone.strip()}\n```\n"
    )
    files, hashes = dict(artifact.manifest["files"]), dict(artifact.manifest["sha256"])
    with staging(artifact.path) as folder:
        for role, text in ((REPORT_MD, markdown), (REPORT_JSON, json.dumps(report, indent=2, allow_nan=False))):
            hashes.pop(files.pop(role, ""), None)
            (folder / role).write_text(text, encoding="utf-8")
            files[role] = _publish_file(folder / role, artifact.path, hashes)
        return _commit(artifact.path, {**artifact.manifest, "files": files, "sha256": hashes, "report": report})


def read(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact's manifest and check its files.

    Raises:
        ArtifactError: it is no artifact, of a newer format, incomplete or damaged.
    """
    folder = Path(path)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"Expected {folder} to hold an artifact, but its {MANIFEST} cannot be read: {error}."
        ) from error
    try:
        artifact = Artifact(folder, parse(text))
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    _check_files(artifact)
    golden.check_belongs(artifact.golden_path, artifact.manifest)
    return artifact


def load(path: str | os.PathLike[str], **runtime_options: Any) -> LoadedModule:
    """Load an artifact as a module with the call signature of the captured one, without the user's code.

    Nothing is unpickled, and every file's hash is checked, which proves that it is whole and not where it comes from:
    .pt2 and .pte files (runtimes "inductor" and "executorch") run native code, so load those only from whom you trust.

    Args:
        path: the artifact's folder.
        **runtime_options: what the artifact's runtime takes; `threads` and `providers` for "onnxruntime".

    Raises:
        ArtifactError: the folder is no artifact or is damaged.
        MissingRuntimeError: its runtime is not installed; the message carries the pip command.
    """
    artifact = read(path)
    runtime = runtimes.get(artifact.manifest["runtime"])
    module = runtime.load(artifact.path, artifact.model_files, artifact.signature, **runtime_options)
    if isinstance(module, LoadedModule):
        hashes = tuple(artifact.manifest["sha256"][name] for name in artifact.model_files.values())
        module.origin = Origin(str(artifact.path.absolute()), hashes, runtime_options)
    return module


def model_files(staged: Path) -> dict[str, str]:
    """Return role to name for a model file that is not published yet and the files beside it."""
    others = {f.name: f.name for f in staged.parent.iterdir() if f != staged and f.name != golden.FILE}
    return {MODEL: staged.name, **others}


def _publish_model(staged: Path, path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Publish a model's file, or its files in a folder of their own, in which they find each other by name."""
    names = model_files(staged)
    digests = {name: hash_file(staged.parent / name) for name in names.values()}
    if len(names) == 1:
        name = publish(staged, path, digests[staged.name])
        return {MODEL: name}, {name: digests[staged.name]}
    together = staged.parent / MODEL
    together.mkdir()
    for name in names.values():
        os.replace(staged.parent / name, together / name)
    folder = publish(together, path, set_digest(digests.values()))
    files = {role: f"{folder}/{name}" for role, name in names.items()}
    return files, {files[role]: digests[name] for role, name in names.items()}


def _publish_file(staged: Path, path: Path, hashes: dict[str, str]) -> str:
    digest = hash_file(staged)
    name = publish(staged, path, digest)
    hashes[name] = digest
    return name


def _commit(path: Path, content: dict[str, Any]) -> Artifact:
    text, manifest = dump(content)
    parse(text)
    commit(path, text, keep=top_level(manifest["files"]))
    return Artifact(path, manifest)


def _check_files(artifact: Artifact) -> None:
    folder, hashes = artifact.path, artifact.manifest["sha256"]
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"Expected {folder} to be complete, but {name} is missing.")
        if path.resolve() != folder.resolve() / name:
            raise ArtifactError(f"Expected files of {folder} to lie inside it, but {name} is a link.")
        if hash_file(path) != expected:
            raise ArtifactError(f"Expected {path} to be as it was written, but its content has changed.")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
