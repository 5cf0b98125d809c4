from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.artifact.golden import NUM_SAMPLES, GoldenBatch, check_belongs, num_samples
from lightning_quant.artifact.golden import load as load_batch
from lightning_quant.artifact.golden import save as save_batch
from lightning_quant.calls.signature import Signature, TensorInfo
from lightning_quant.errors import ArtifactError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(8, 6, generator=GENERATOR), torch.randn(8, 4, generator=GENERATOR)
SIGNATURE = Signature(
    parameters=(("x", "POSITIONAL_OR_KEYWORD", "required"), ("mask", "POSITIONAL_OR_KEYWORD", "required")),
    inputs=(TensorInfo("x", "float32", ("batch", 6)), TensorInfo("mask", "bool", ("batch",))),
    constants=(),
    outputs=(TensorInfo("output", "float32", ("batch", 6)),),
    structure={"tensor": 0},
)
CONTENT = {"signature": SIGNATURE.to_dict(), "runtime": "onnxruntime"}
BATCH = GoldenBatch((A[:2], torch.tensor([True, False])), (A[:2],), (A[:2] + 1,))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        left = self.left(a)
        return {"left": left, "same": left, "both": left + self.right(b)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    torch.manual_seed(0)
    model = TwoHeads().eval()
    return model, quantize(model, calibration_data=[(A, B)], output_dir=tmp_path_factory.mktemp("golden") / "out")


def test_holds_real_samples_and_what_both_models_made_of_them(made: tuple[nn.Module, Artifact]) -> None:
    model, artifact = made
    batch = load_batch(artifact.golden_path, artifact.signature)
    with torch.no_grad():
        floating, exported = model(A[:4], B[:4]), load(artifact.path)(A[:4], B[:4])

    assert [tensor.shape[0] for tensor in batch.inputs] == [NUM_SAMPLES] * 2
    assert torch.equal(batch.inputs[0], A[:4])
    assert torch.equal(batch.inputs[1], B[:4])
    assert [info.name for info in artifact.signature.outputs] == list(floating)
    for name, a, b in zip(floating, batch.float_outputs, batch.artifact_outputs, strict=True):
        assert torch.equal(a, floating[name])
        assert torch.equal(b, exported[name])
        assert not torch.equal(a, b)


def test_round_trip_keeps_types_and_values(tmp_path: Path) -> None:
    save_batch(tmp_path / "g.safetensors", BATCH, CONTENT)
    read = load_batch(tmp_path / "g.safetensors", SIGNATURE)

    for saved, loaded in zip(vars(BATCH).values(), vars(read).values(), strict=True):
        assert [tensor.dtype for tensor in loaded] == [tensor.dtype for tensor in saved]
        assert all(torch.equal(a, b) for a, b in zip(saved, loaded, strict=True))


def test_views_and_results_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    batch = GoldenBatch((A[:2].T.contiguous().T, BATCH.inputs[1]), (A[:2],), (A[:2],))
    save_batch(tmp_path / "g.safetensors", batch, CONTENT)

    assert torch.equal(load_batch(tmp_path / "g.safetensors", SIGNATURE).inputs[0], A[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "float.output"}, "to hold 'float.output', but it does not"),
        (lambda t: {**t, "other": t["input.x"].clone()}, r"holds \['other'\] besides"),
        (lambda t: {**t, "input.x": t["input.x"][0]}, "'input.x' .* to have 2 dimensions, but got 1"),
    ],
)
def test_tensors_of_another_signature_are_refused(change: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    save_batch(path, BATCH, CONTENT)
    save_file(change({k: v.clone() for k, v in load_file(path).items()}), path)  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=message):
        load_batch(path, SIGNATURE)


@pytest.mark.parametrize("data", [b"", b"no safetensors", b"\xff" * 100])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "g.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="to hold a golden batch"):
        load_batch(tmp_path / "g.safetensors", SIGNATURE)


def test_batch_of_another_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    save_batch(path, BATCH, CONTENT)
    check_belongs(path, {**CONTENT, "files": {}})
    for other in ({**CONTENT, "runtime": "openvino"}, {**CONTENT, "classes": ["a"]}, {"runtime": "onnxruntime"}):
        with pytest.raises(ArtifactError, match="were not written together"):
            check_belongs(path, other)
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="to hold a golden batch"):
        check_belongs(path, CONTENT)


def test_large_inputs_make_small_batches() -> None:
    megabyte = torch.zeros(32, 2**18)

    assert num_samples([A], 8) == NUM_SAMPLES
    assert num_samples([A[:3]], 3) == 3
    assert num_samples([megabyte], 32) == 4
    assert num_samples([megabyte.repeat(1, 2)], 32) == 2
    assert num_samples([megabyte.repeat(1, 6)], 32) == 1
    assert num_samples([], 1) == 1
