"""Whatever a disk refuses ends in an error with the way out, with the artifact that was there or the new one."""

import errno
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import lightning_models
import pytest
import torch
from failing_files import Disk, failing
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import fit, seeded
from torch import nn

import lightning_quant as lq
from lightning_quant.artifact.artifact import read
from lightning_quant.errors import DiskError, NoEffectWarning, QuantizationError
from lightning_quant.export.auto import choose_runtime
from lightning_quant.machine.disk import disk_refusal, scratch_folder, taking
from lightning_quant.runtimes._flat import exporting

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def hashes(folder: Path) -> list[str]:
    artifact = read(folder)
    return [artifact.manifest["sha256"][name] for name in artifact.model_files.values()]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier") / "quantized"
    lq.quantize(net(1), calibration_data=[X], output_dir=folder)
    return folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("operation", "part", "code", "stays", "says"),
    [
        ("mkdir", "scratch/lightning_quant-", errno.ENOSPC, "new", "TMPDIR"),
        ("open", "scratch/lightning_quant-", errno.EACCES, "new", "TMPDIR"),
        ("open", "/model.onnx", errno.EIO, "earlier", "another `output_dir`"),
        ("rename", "quantized/.lightning_quant-", errno.EROFS, "earlier", "another `output_dir`"),
        ("replace", ".lightning_quant-model.onnx", errno.EACCES, "new", "`load` and `verify` open them"),
        ("open", "report.md", errno.ENOSPC, "new", "without which the artifact is there"),
    ],
    ids=["no scratch folder", "no scratch file", "no model", "no commit", "no names", "no report"],
)
def test_a_refusal_names_the_place_and_the_way_out(
    operation: str, part: str, code: int, stays: str, says: str, earlier: Path, scratch: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(earlier, folder)
    before = hashes(folder)

    disk = Disk(code, is_wanted=lambda name, path: name == operation and part in path)
    with failing(disk), pytest.raises(QuantizationError) as raised:
        lq.quantize(net(2), calibration_data=[X], output_dir=folder)

    assert disk.refused is not None
    assert says in str(raised.value)
    assert os.strerror(code) in str(raised.value)
    assert str(scratch if "TMPDIR" in says else folder) in str(raised.value)
    assert (hashes(folder) == before) == (stays == "earlier")
    assert lq.load(folder)(X).shape == (8, 3)
    assert not list(scratch.iterdir())
    assert not [entry for entry in folder.iterdir() if entry.name.startswith(".lightning_quant-")]


@pytest.mark.usefixtures("scratch")
def test_trial_export_has_no_room_before_the_first_batch(tmp_path: Path) -> None:
    disk = Disk(errno.ENOSPC, is_wanted=lambda name, path: name == "mkdir" and "scratch/lightning_quant-" in path)
    module = seeded()
    with failing(disk), pytest.raises(MisconfigurationException, match="TMPDIR"):
        fit(module, lq.PostTrainingQuantization(output_dir=tmp_path / "quantized"))
    assert module.trainer.global_step == 0


@pytest.mark.usefixtures("unmeasured")
def test_no_room_for_the_report_ends_no_fit(tmp_path: Path) -> None:
    disk = Disk(errno.ENOSPC, is_wanted=lambda name, path: name == "open" and path.endswith("report.md"))
    module, callback = seeded(), lq.PostTrainingQuantization(output_dir=tmp_path / "quantized")
    with failing(disk), pytest.warns(NoEffectWarning, match="No space left.* loggers alone have the report"):
        fit(module, callback)
    assert callback.artifact.path == tmp_path / "quantized"
    assert lq.load(callback.artifact.path)(lightning_models.images(4).tensors[0]).shape[0] == 4
    assert module.trainer.callback_metrics["quant/size_ratio"] > 0


def test_a_full_disk_is_no_reason_to_fix_sizes_or_to_take_another_runtime(tmp_path: Path) -> None:
    disk = Disk(errno.ENOSPC, is_wanted=lambda name, path: name == "open" and path.endswith("model.onnx"))
    with failing(disk), pytest.raises(DiskError, match="No space left"):
        lq.quantize(net(0), calibration_data=[X], output_dir=tmp_path / "quantized")

    with pytest.raises(OSError, match="No space left"), exporting("ExecuTorch"):
        raise RuntimeError("cannot write") from OSError(errno.ENOSPC, "No space left on device")

    def full(_: str) -> Any:
        raise DiskError("no room")

    with pytest.raises(DiskError, match="no room"):
        choose_runtime(full)


def test_native_writers_that_say_less_are_understood() -> None:
    said = RuntimeError("PytorchStreamWriter failed: No space left on device\nat ...")
    assert str(disk_refusal(said)) == "PytorchStreamWriter failed: No space left on device"
    outer = ValueError("cannot export")
    outer.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert disk_refusal(outer) is outer.__cause__
    assert disk_refusal(FileNotFoundError(errno.ENOENT, "No such file", "flatc")) is None


def test_errors_about_files_of_the_user_stay_what_they_are(tmp_path: Path) -> None:
    beside = str(Path(tempfile.gettempdir()) / "data" / "train.csv")
    missing = [FileNotFoundError(errno.ENOENT, "gone", name) for name in ("/data/train.csv", beside)]
    for theirs in (*missing, ConnectionRefusedError(111, "away")):
        with pytest.raises(type(theirs)), taking(tmp_path, "the artifact"):
            raise theirs
    with pytest.raises(DiskError, match="to take temporary files"), scratch_folder() as folder:
        raise OSError(errno.EIO, "Input/output error", str(folder / "model.onnx"))
    assert not folder.exists()


RUNS = [
    *[("quantize", "int8", runtime) for runtime in ("onnxruntime", "openvino", "torch", "executorch")],
    *[("quantize", "int8_dynamic", runtime) for runtime in ("onnxruntime", "torch")],
    *[(kind, "int8", "onnxruntime") for kind in ("PTQ", "QAT")],
]


@pytest.mark.slow
@pytest.mark.parametrize("is_replaced", [False, True], ids=["first", "replaces"])
@pytest.mark.parametrize(("kind", "recipe", "runtime"), RUNS)
def test_any_file_operation_may_be_refused(
    kind: str, recipe: str, runtime: str, is_replaced: bool, earlier: Path, scratch: Path, tmp_path: Path
) -> None:
    def run(folder: Path) -> None:
        if kind == "quantize":
            lq.quantize(net(2), recipe, runtime, calibration_data=[X], output_dir=folder)
            return
        kinds: dict[str, Any] = {"PTQ": lq.PostTrainingQuantization, "QAT": lq.QuantizationAwareTraining}
        fit(seeded(), kinds[kind](recipe, runtime, output_dir=folder))

    codes = (errno.ENOSPC, errno.EACCES, errno.EIO)
    with failing(Disk(0)) as counted:
        run(tmp_path / "whole")
    # A dozen of some hundred operations, others in each of these tests.
    step = max(1, counted.count // 12)
    first = 1 + zlib.crc32(f"{kind} {recipe} {runtime} {is_replaced}".encode()) % step
    for number in range(first, counted.count + 1, step):
        folder = tmp_path / str(number)
        if is_replaced:
            shutil.copytree(earlier, folder)
        disk = Disk(codes[number % len(codes)], number)
        outcome = "ended"
        with failing(disk):
            try:
                run(folder)
            except (QuantizationError, MisconfigurationException) as error:
                outcome = str(error)
        where = number, disk.refused, outcome
        assert outcome == "ended" or "Expected" in outcome, where
        assert not list(scratch.iterdir()), where
        left = list(folder.iterdir()) if folder.exists() else []
        assert not [entry for entry in left if entry.name.startswith(".lightning_quant-")], where
        assert outcome == "ended" or os.strerror(disk.code) in outcome, where
        if left:
            assert hashes(folder), where
        shutil.rmtree(folder, ignore_errors=True)
