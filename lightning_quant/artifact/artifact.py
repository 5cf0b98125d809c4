"""The folder on disk: model files, manifest, golden batch, report.

The names are plain and stable, model.onnx or model.xml for example; manifest.json has the hash of every file, and all
of them replace those of an older artifact at once (see `commit.py`). Hashes prove that files are whole, not where they
come from: formats with native code (.pt2, .pte) run it when loaded, so load only what you trust, or what is signed.
"""

import functools
import importlib
import itertools
import json
import platform
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lightning_quant import __version__, runtimes
from lightning_quant.arguments.reading import read_bytes
from lightning_quant.artifact import golden
from lightning_quant.artifact.commit import commit, current, link, locked
from lightning_quant.artifact.folder import check_folder, hash_file, is_free, staging
from lightning_quant.artifact.manifest import (
    FORMAT_VERSION,
    GOLDEN,
    MANIFEST,
    MAX_BYTES,
    MODEL,
    REPORT_HTML,
    REPORT_JSON,
    REPORT_MD,
    REPORTS,
    dump,
    is_same_model,
    parse,
)
from lightning_quant.artifact.stored import Artifact, load, open_model, private_copy, read, replaced
from lightning_quant.errors import ArtifactError, NoEffectWarning
from lightning_quant.machine.machine import cpu_name
from lightning_quant.terminal.tables import one_line

__all__ = ["Artifact", "add_report", "check_folder", "load", "open_model", "private_copy", "read", "staging", "write"]
_NO_PAGE = (LookupError, TypeError, ValueError, AttributeError, TemplateError)
ToPage = Callable[[dict[str, Any], str], str]
_PACKAGES = ("lightning_quant", "torch", "lightning", "safetensors")


def write(path: Path, staged: Path, content: dict[str, Any]) -> Artifact:
    """Publish what lies in a staging folder as an artifact.

    Args:
        path: the artifact's folder.
        staged: the model file inside a staging folder; beside it the golden batch as `golden.FILE`, and all other files
            are further files of the model.
        content: what the manifest says beyond files and versions: recipe, runtime, signature, plan, what stays outside,
            and classes when known.
    """
    files = {**model_files(staged), GOLDEN: golden.FILE}
    requires = runtimes.get(content["runtime"]).REQUIRES
    manifest = {
        "format_version": FORMAT_VERSION,
        **content,
        "files": files,
        "sha256": {name: hash_file(staged.parent / name) for name in files.values()},
        "versions": {package: _version(package) for package in dict.fromkeys((*_PACKAGES, *requires))},
        "python": platform.python_version(),
        "cpu": cpu_name(),
    }
    with locked(path):
        return _commit(path, staged.parent, manifest)


def add_report(
    artifact: Artifact,
    report: dict[str, Any],
    markdown: str,
    *,
    to_page: ToPage | None = None,
    own: Artifact | None = None,
) -> Artifact:
    """Add what was measured to an artifact: to its manifest and as report.md, .json and .html beside the model.

    report.md ends with the lines that run the model without this package.

    Args:
        artifact: as written; the one in its folder must still be of the same model.
        report: what was measured.
        markdown: the same as text.
        to_page: makes report.html of the manifest and of lines that run the model; no page when None.
        own: private copy of the artifact. Where another run has replaced it meanwhile, the copy is written to a folder
            beside, with a warning, so that both are kept.

    Raises:
        ArtifactError: another run has replaced the artifact, and there is no copy.
    """
    beside = (artifact.path.with_name(f"{artifact.path.name}-{number}") for number in itertools.count(2))
    for path in itertools.chain([artifact.path], beside):
        with staging(path, "the report, without which the artifact is there") as folder, locked(path):
            if _holds(path, artifact):
                source = current(path)
            elif own is not None and is_free(path):
                source = own.path
            else:
                source = None
            if source is not None:
                content = _with_report(artifact, source, folder, report, markdown, to_page)
                result = _commit(path, folder, content)
                break
        if own is None:
            raise replaced(artifact.path)
    if result.path != artifact.path:
        warnings.warn(f"{replaced(artifact.path)} This run's artifact is in {path}.", NoEffectWarning, stacklevel=2)
    return result


def model_files(staged: Path) -> dict[str, str]:
    """Return role to name for a model file that is not published yet and the files beside it."""
    others = {f.name: f.name for f in staged.parent.iterdir() if f != staged and f.name != golden.FILE}
    return {MODEL: staged.name, **others}


def _with_report(
    artifact: Artifact,
    source: Path,
    folder: Path,
    report: dict[str, Any],
    markdown: str,
    to_page: ToPage | None,
) -> dict[str, Any]:
    """Stage the files of an artifact anew with a report beside them; return what the manifest is to say."""
    names = {role: name for role, name in artifact.manifest["files"].items() if role not in REPORTS}
    hashes = {Path(name).name: artifact.manifest["sha256"][name] for name in names.values()}
    for name in names.values():
        link(source / name, folder / Path(name).name)
    files = {role: Path(name).name for role, name in names.items()}
    lines = standalone(artifact, files)
    markdown = (
        f"{markdown.rstrip()}\n\n## What stays outside\n\n{one_line(artifact.manifest['outside'])}\n\n"
        f"## Run it without lightning_quant, in this folder\n\n```python\n{lines.strip()}\n```\n"
    )
    content = {**artifact.manifest, "files": files, "sha256": hashes, "report": report}
    texts = {REPORT_MD: markdown, REPORT_JSON: json.dumps(report, indent=2, allow_nan=False)}
    try:
        texts |= {} if to_page is None else {REPORT_HTML: to_page(content, lines)}
    except _NO_PAGE as error:
        # What was trained and measured is not lost for the sake of its looks.
        warnings.warn(f"{REPORT_HTML} could not be made: {error!r}. Please report this.", NoEffectWarning, stacklevel=2)
    for role, text in texts.items():
        (folder / role).write_text(text, encoding="utf-8")
        files[role], hashes[role] = role, hash_file(folder / role)
    return content


def page_of(artifact: Artifact, to_page: ToPage) -> str:
    """Return the report as HTML, made of what the manifest says: the page in the folder of a stranger may be another.

    Raises:
        ArtifactError: nothing was measured, or by another version that measured something else.
    """
    if artifact.report is None:
        raise ArtifactError(f"Expected {artifact.path} to hold a report, but nothing was measured of it.")
    try:
        return to_page(artifact.manifest, standalone(artifact))
    except _NO_PAGE as error:
        raise ArtifactError(
            f"Expected the report in {artifact.path} to be one of this version, but {type(error).__name__}: {error}."
        ) from error


def standalone(artifact: Artifact, files: dict[str, str] | None = None) -> str:
    """Return the lines that run an artifact's model without this package, in its folder or one of these files."""
    files = artifact.manifest["files"] if files is None else files
    runtime = runtimes.get(artifact.manifest["runtime"])
    own = {role: Path(files[role]).name for role in artifact.model_files}
    return runtime.standalone(own, artifact.signature)


def _commit(path: Path, folder: Path, content: dict[str, Any]) -> Artifact:
    text, manifest = dump(content)
    parse(text)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    commit(path, folder)
    return Artifact(path, manifest)


def _holds(path: Path, artifact: Artifact) -> bool:
    """Tell whether a folder holds the model of an artifact, whatever was measured of it since."""
    try:
        manifest = parse(read_bytes(current(path) / MANIFEST, MAX_BYTES))
    except ArtifactError:
        return False
    return is_same_model(manifest, artifact.manifest)


@functools.cache
def _version(package: str) -> str | None:
    if package == __package__:
        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # Installed without metadata: a source tree, a zip, a frozen program.
        return getattr(importlib.import_module(package), "__version__", None)
