"""What manifest.json may say: reading it strictly, and writing it with a hash of its own."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any

from lightning_quant.arguments.reading import parse_json
from lightning_quant.artifact.recorded_report import is_report
from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError

MANIFEST, SIGNATURE_FILE = "manifest.json", "manifest.sig"
FORMAT_VERSION = 1
MAX_BYTES = 16 * 2**20
"""Of a manifest; one of a thousand layers with its report has one."""
MODEL, GOLDEN, REPORT_MD, REPORT_JSON = "model", "golden", "report.md", "report.json"
REPORT_HTML = "report.html"
"""Roles of files; every other role is a further file of the model."""
REPORTS = (REPORT_MD, REPORT_JSON, REPORT_HTML)
BESIDE_MODEL = (GOLDEN, *REPORTS)
_CONTENT = ("recipe", "runtime", "signature", "plan", "outside", "classes", "into_only")
_OWN_HASH = "manifest_sha256"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A file in the artifact's folder, or in a folder of the model's files there.
_NAME = re.compile(r"([A-Za-z0-9_][\w.\-]*/)?[A-Za-z0-9_][\w.\-]*", re.ASCII)
_ROW = {"name": str, "kind": str, "action": str, "reason": str, "macs": int}


def dump(content: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the text of manifest.json for a content, and what reading that text gives."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    plain[_OWN_HASH] = _digest(plain)
    return json.dumps(plain, indent=2, allow_nan=False), plain


def parse(text: bytes | str) -> dict[str, Any]:
    """Read and check the text of a manifest.json.

    Raises:
        ArtifactError: it is something else, of another format, damaged, or a field is missing, unknown or of another
            type.
    """
    try:
        manifest = parse_json(text, MAX_BYTES)
    except ArtifactError as error:
        raise ArtifactError(f"Expected manifest.json to hold a manifest, but it cannot be read: {error}") from error
    try:
        if not isinstance(manifest, dict) or "format_version" not in manifest:
            raise ArtifactError("Expected manifest.json to be a manifest of lightning_quant, but it is something else.")
        _check_version(manifest["format_version"])
        if manifest.get(_OWN_HASH) != _digest(manifest):
            raise ArtifactError("Expected manifest.json to be as it was written, but its content has changed.")
        _check_fields(manifest)
        Signature.from_dict(manifest["signature"])
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"Expected manifest.json to hold a manifest, but it cannot be read: {error}.") from error
    return manifest


def top_level(files: dict[str, str]) -> set[str]:
    """Return the names that a manifest's files have in the artifact's folder itself."""
    return {name.partition("/")[0] for name in files.values()}


def is_file_name(value: Any) -> bool:
    """Tell whether a value is the name of a file in an artifact's folder, or in a folder there."""
    return isinstance(value, str) and len(value) < 200 and _NAME.fullmatch(value) is not None


def content_digest(manifest: dict[str, Any]) -> str:
    """Return the digest of what a manifest says of the model itself, which the golden batch carries as well."""
    return _digest({key: manifest[key] for key in _CONTENT if key in manifest})


def is_same_model(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Tell whether two manifests name one model, whatever was measured of it since."""

    def hashes(manifest: dict[str, Any]) -> dict[str, str]:
        files = manifest["files"].items()
        return {role: manifest["sha256"][name] for role, name in files if role not in REPORTS}

    return hashes(first) == hashes(second) and content_digest(first) == content_digest(second)


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != _OWN_HASH}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_version(version: Any) -> None:
    if not _is_int(version) or version < 1:
        raise ArtifactError(f"Expected `format_version` to be a positive integer, but got {version!r:.80}.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"Expected an artifact of format {FORMAT_VERSION} or older, but it has format {version}: upgrade "
            "lightning_quant."
        )


def _check_fields(manifest: dict[str, Any]) -> None:
    missing, unknown = set(_FIELDS) - set(manifest), set(manifest) - set(_FIELDS) - set(_OPTIONAL) - {_OWN_HASH}
    if missing or unknown:
        what = f"lacks {sorted(missing)}" if missing else f"has unknown fields {sorted(unknown)[:5]}"
        raise ArtifactError(f"Expected manifest.json to have the fields of format {FORMAT_VERSION}, but it {what}.")
    for name, (fits, kind) in (_FIELDS | _OPTIONAL).items():
        if name in manifest and not fits(manifest[name]):
            raise ArtifactError(f"Expected `{name}` in manifest.json to be {kind}, but got {manifest[name]!r:.80}.")
    files, hashes = manifest["files"], manifest["sha256"]
    if set(files.values()) != set(hashes) or len(set(files.values())) != len(files):
        raise ArtifactError("Expected manifest.json to have one hash for each of its files, but it has not.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_plan(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("coverage"), int | float)
        and math.isfinite(value["coverage"])
        and isinstance(value.get("rows"), list)
        and all(
            isinstance(row, dict) and all(type(row.get(key)) is kind for key, kind in _ROW.items())
            for row in value["rows"]
        )
    )


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and MODEL in value and GOLDEN in value and all(map(is_file_name, value.values()))


def _are_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) and _SHA256.fullmatch(v) for v in value.values())


def _are_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(v is None or isinstance(v, str) for v in value.values())


def _is_engine(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"name", "measured"} and all(map(_is_text, value.values()))


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(label, str) for label in value)


Field = tuple[Callable[[Any], bool], str]
_FIELDS: dict[str, Field] = {
    "format_version": (_is_int, "an integer"),
    "recipe": (_is_text, "a name"),
    "runtime": (_is_text, "a name"),
    "signature": (lambda value: isinstance(value, dict), "a call signature"),
    "plan": (_is_plan, "a plan"),
    "outside": (_is_text, "a text"),
    "files": (_are_files, "role to name of files inside the folder, with a model and a golden batch"),
    "sha256": (_are_hashes, "file name to hash"),
    "versions": (_are_versions, "package name to version"),
    "python": (_is_text, "a version"),
    "cpu": (_is_text, "a name"),
}
_OPTIONAL: dict[str, Field] = {
    "engine": (_is_engine, "the name of an engine, and what was measured"),
    "classes": (_are_classes, "a list of labels"),
    "into_only": (_is_text, "the reason why there is no program"),
    "report": (is_report, "what was measured"),
}
