"""Artifacts as they lie in a folder, of files that no runtime looks at."""

from pathlib import Path

from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import Artifact, staging

SIGNATURE = {"parameters": [], "inputs": [], "constants": [], "outputs": [], "structure": {"constant": None}}


CONTENT = {
    "recipe": "int8",
    "runtime": "onnxruntime",
    "signature": SIGNATURE,
    "plan": {"coverage": 1.0, "rows": []},
    "outside": "nothing",
}


ONE, TWO = {"model.onnx": b"one"}, {"model.xml": b"two", "model.bin": b"weights"}


def publish(folder: Path, files: dict[str, bytes], *, report: bool = False) -> Artifact:
    """Write files as an artifact; the first is the model, and no runtime looks at it."""
    with staging(folder) as stage:
        for name, data in files.items():
            (stage / name).write_bytes(data)
        golden.save(stage / golden.FILE, golden.GoldenBatch((), (), ()), CONTENT)
        artifact = artifacts.write(folder, stage / next(iter(files)), CONTENT)
    return artifacts.add_report(artifact, {"a": 1}, "# Report") if report else artifact


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def named(artifact: Artifact) -> set[str]:
    return {"manifest.json", *artifact.manifest["files"].values()}
