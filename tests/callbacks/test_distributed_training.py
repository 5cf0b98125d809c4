"""Two processes on the CPU: equal ranges everywhere, metrics of all data, one artifact, and no process left waiting."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_runs
import pytest
import torch
from distributed_runs import BATCH, NUM_VALIDATION, SCHEDULE, Uneven
from features import feature
from lightning.pytorch import strategies
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, ConvNet, decibels, fit, images, make_trainer, seeded, validate_by_hand
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_quant import QuantizationAwareTraining, Recipe, load
from lightning_quant.calibrate.distributed import Group, merge_batch
from lightning_quant.errors import CalibrationError
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.fake_quantize import channel_maximum, least_error_scale
from lightning_quant.ranges.observers import Histogram

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
TESTS = Path(distributed_runs.__file__).parent


def launch(scenario: str, strategy: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script that starts two processes."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK"):
        environment.pop(name, None)
    command = [sys.executable, str(TESTS / "distributed_runs.py"), scenario, strategy, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=800)


class Runs:
    """What both processes of every run ended with."""

    def __init__(self, scenario: str, strategy: str, folder: Path) -> None:
        self.folder = folder
        result = launch(scenario, strategy, folder)
        assert "finished" in result.stdout, result.stderr[-4000:]

    def both(self, name: str) -> tuple[Any, Any]:
        first, second = (torch.load(self.folder / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1))
        return first, second


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs("all", "ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def started(ddp: Runs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    made = {"ddp": ddp}

    def of(strategy: str) -> Runs:
        if strategy not in made:
            made[strategy] = Runs("short", strategy, tmp_path_factory.mktemp(strategy))
        return made[strategy]

    return of


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


# --- training


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("ddp", marks=feature("Several processes", "ddp", only="QAT")),
        pytest.param("ddp_fork", marks=[feature("Several processes", "ddp_fork", only="QAT"), pytest.mark.slow]),
        pytest.param("ddp_spawn", marks=[feature("Several processes", "ddp_spawn", only="QAT"), pytest.mark.slow]),
    ],
)
def test_ranges_are_those_of_the_extremes_over_all_processes(strategy: str, started: Callable[[str], Runs]) -> None:
    first, second = started(strategy).both("qat")
    extremes = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(first["seen"], second["seen"], strict=True)]
    low, high = torch.tensor(extremes[0][0]), torch.tensor(extremes[0][1])
    for index, (lowest, highest) in enumerate(extremes[1 : SCHEDULE["freeze_observers"]], 2):
        weight = max(0.05, 1 / index)
        low = torch.lerp(low, torch.tensor(lowest), weight)
        high = torch.lerp(high, torch.tensor(highest), weight)

    assert first["world"] == second["world"] == 2
    assert first["seen"] != second["seen"]
    assert equal(first["ranges"], second["ranges"])
    assert torch.equal(first["ranges"][":x"]["low"], low)
    assert torch.equal(first["ranges"][":x"]["high"], high)
    assert first["ranges"][":x"]["num_updates"] == SCHEDULE["freeze_observers"]
    parameters = [name for name, _ in Classifier().named_parameters()]
    assert all(torch.equal(first["tensors"][name], second["tensors"][name]) for name in parameters)


@feature("Several processes", "checkpoints: plain, and with the same ranges", only="QAT")
def test_checkpoint_of_several_processes_is_plain(ddp: Runs) -> None:
    path = ddp.folder / "qat-ckpt" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    (state,) = [state for key, state in saved["callbacks"].items() if key.startswith("QuantizationAware")]
    Classifier.load_from_checkpoint(path, strict=True, weights_only=True)

    assert equal(state["observers"], ddp.both("qat")[1]["ranges"])


@feature("Several processes", "find_unused_parameters", only="QAT")
def test_parameters_that_nothing_uses(ddp: Runs) -> None:
    first, second = ddp.both("unused")

    assert equal(first["ranges"], second["ranges"])
    assert load(ddp.folder / "unused")(torch.randn(2, 1, 8, 8)).shape == (2, 4)


def test_learned_steps_move_by_the_gradients_of_all_processes(ddp: Runs) -> None:
    first, second = ddp.both("learned")
    start = {}
    for identity, operator in prepare(seeded(Uneven).net.eval(), (images(4).tensors[0],)).operators.items():
        if operator.weight:
            weight = seeded(Uneven).net.get_parameter(operator.weight)
            start[identity] = least_error_scale(weight, channel_maximum(weight) / 7, 7).log()

    assert first["seen"] != second["seen"]
    assert first["steps"].keys() == second["steps"].keys() == start.keys()
    for identity, steps in first["steps"].items():
        assert torch.equal(steps, second["steps"][identity])
        assert not torch.equal(steps, start[identity])


@feature("Several processes", "`distill=`", only="QAT")
def test_a_taught_module_has_the_same_weights_in_all_processes(ddp: Runs) -> None:
    first, second = ddp.both("learned")
    parameters = [name for name, _ in Classifier().named_parameters()]

    assert first["seen"] != second["seen"]
    assert all(torch.equal(first["tensors"][name], second["tensors"][name]) for name in parameters)


# --- calibration


def test_calibration_uses_as_much_data_as_was_asked_for(ddp: Runs) -> None:
    first, _ = ddp.both("min_max")

    # Four batches in all, two in each process.
    assert first["ranges"][":x"]["num_updates"] == 4


@feature("Several processes", "ddp", only="PTQ")
def test_calibration_is_that_of_one_process_with_all_data(ddp: Runs) -> None:
    first, second = ddp.both("min_max")
    x = images(28, seed=1).tensors[0]
    module = seeded(Uneven)
    module.load_state_dict(first["tensors"])
    net = module.net.eval()
    with torch.no_grad():
        hidden = torch.relu(net.bn1(net.conv1(x)))

    # 28 images, two batches of 8 and 6 in each process: all of them.
    assert equal(first["ranges"], second["ranges"])
    assert torch.equal(first["ranges"][":x"]["high"], x.max())
    assert torch.equal(first["ranges"][":x"]["low"], x.min())
    assert first["ranges"][":relu"]["high"].item() == pytest.approx(hidden.max().item(), rel=1e-6)


def test_histograms_of_all_processes_are_added_up(ddp: Runs) -> None:
    first, second = ddp.both("ptq")
    x = images(28, seed=1).tensors[0]
    state = first["ranges"][":x"]
    alone = Histogram()
    alone.span_low, alone.span_high = state["span_low"], state["span_high"]
    alone.update(x)

    assert equal(first["ranges"], second["ranges"])
    assert equal(first["corrections"], second["corrections"])
    assert len(first["corrections"]) == 3
    assert torch.equal(state["counts"], alone.counts)
    assert state["counts"].sum() == x.numel()


# --- evaluation and the artifact


@pytest.mark.parametrize(
    ("name", "callback"),
    [
        pytest.param("qat", "QAT", marks=feature("Several processes", "evaluation by all processes", only="QAT")),
        pytest.param("ptq", "PTQ", marks=feature("Several processes", "evaluation by all processes", only="PTQ")),
    ],
)
def test_metrics_are_those_of_all_validation_data_seen_once(name: str, callback: str, ddp: Runs) -> None:
    first, second = ddp.both(name)
    loader = DataLoader(images(NUM_VALIDATION, seed=2), NUM_VALIDATION)
    by_hand = validate_by_hand(load(ddp.folder / name), loader)

    # 21 images for two processes: a DistributedSampler shows one of them twice.
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["val_accuracy"]["artifact"] == pytest.approx(by_hand["val_accuracy"], abs=1e-6)
    assert first["metrics"]["val_loss"]["artifact"] == pytest.approx(by_hand["val_loss"], abs=1e-5)
    assert first["metrics"]["val_loss"]["num_samples"] == NUM_VALIDATION
    float_net = seeded(Uneven)
    float_net.load_state_dict(first["tensors"])
    float_values = validate_by_hand(float_net.net.eval(), loader)
    assert first["metrics"]["val_loss"]["float_value"] == pytest.approx(float_values["val_loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["qat", "ptq"])
def test_scores_are_of_all_validation_data(name: str, ddp: Runs) -> None:
    first, second = ddp.both(name)
    assert first["scores"] == second["scores"]
    # While training, a DistributedSampler shows one of 21 images twice, here the first.
    seen = Subset(images(NUM_VALIDATION, seed=2), [*range(NUM_VALIDATION), 0])
    float_net = seeded(Uneven)
    float_net.load_state_dict(first["tensors"])
    for kind, module in (("float", float_net.net.eval()), ("twin", load(ddp.folder / name))):
        for metric, value in validate_by_hand(module, DataLoader(seen, NUM_VALIDATION + 1)).items():
            twin = first["scores"][f"quant/twin/{metric}"]
            scored = twin if kind == "twin" else twin - first["scores"][f"quant/twin_delta/{metric}"]
            # A score of post-training quantization learns its ranges from fewer batches than the artifact.
            apart = 0.1 if (name, kind) == ("ptq", "twin") else 1e-5
            assert scored == pytest.approx(value, abs=apart), (kind, metric)


def test_artifact_is_that_of_the_first_process(ddp: Runs) -> None:
    first, _ = ddp.both("qat")
    module = seeded(Uneven)
    module.load_state_dict(first["tensors"])
    x = images(BATCH, seed=1).tensors[0]
    with torch.no_grad():
        assert decibels(module.net.eval()(x), load(ddp.folder / "qat")(x)) > 12
    assert (ddp.folder / "qat" / "report.md").is_file()


# --- when things go wrong


@feature("Several processes", "one process fails: all end", only="QAT")
def test_failing_process_leaves_none_waiting(tmp_path: Path) -> None:
    # A process that waits for another one gives up after half an hour, this test's limit is five minutes.
    result = launch("fails", "ddp", tmp_path)

    assert result.returncode != 0
    assert "the second process failed" in result.stderr
    assert "finished" not in result.stdout
    assert not (tmp_path / "fails").exists()


# --- refused


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=feature(
                "Several processes", label, refused="it may shard parameters; use `quantize_checkpoint` after fit"
            ),
        )
        for name, label in (
            ("FSDPStrategy", "FSDP"),
            ("DeepSpeedStrategy", "DeepSpeed"),
            ("ModelParallelStrategy", "ModelParallel"),
        )
    ],
)
def test_strategies_that_shard_are_refused_with_the_way_out(
    kind: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Made without its constructor, which asks for an accelerator or a package.
    strategy = object.__new__(getattr(strategies, name))
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer), "strategy", property(lambda _: strategy))
    with pytest.raises(MisconfigurationException, match=rf"got {name}, which.*quantize_checkpoint\(ckpt_path"):
        kind(output_dir=tmp_path / "artifact").setup(trainer, Classifier(), "fit")

    assert not (tmp_path / "artifact").exists()


# --- SyncBatchNorm


@feature(
    "Several processes",
    "SyncBatchNorm in one process",
)
def test_synchronized_batch_norm_in_one_process(kind: Any, tmp_path: Path) -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(ConvNet())
    callback = kind(output_dir=tmp_path, evaluate=False)
    module = seeded(net=net)
    fit(module, callback, max_epochs=2)
    x = images(BATCH, seed=1).tensors[0]

    assert type(net.bn1).__name__ == "SyncBatchNorm"
    assert callback.artifact.plan["coverage"] == 1.0
    with torch.no_grad():
        assert decibels(net.eval()(x), load(tmp_path)(x)) > 15


@feature("Several processes", "SyncBatchNorm between processes", only="QAT", needs="two GPUs")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: PyTorch has no SyncBatchNorm between CPUs")
def test_synchronized_batch_norm_between_two_gpus(tmp_path: Path) -> None:
    result = launch("sync", "ddp", tmp_path)

    assert "finished" in result.stdout, result.stderr[-4000:]


def test_histograms_while_training_in_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = QuantizationAwareTraining(Recipe(training_observer="mse"), output_dir="unused")
    callback.group.size = 2
    with pytest.raises(ValueError, match="`training_observer` to be 'moving_average' or 'min_max'"):
        callback._check_names(make_trainer(callback), Classifier())


def test_values_that_are_no_numbers_in_one_process_are_refused_in_all() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    prepared = prepare(model, (torch.randn(3, 4),))
    prepared.ranges.waits = True
    with prepared.attached("observe", observing=True):
        model(torch.full((3, 4), torch.nan))
    merge_batch(Group(), prepared.ranges)

    with pytest.raises(CalibrationError, match="Expected finite values"):
        prepared.ranges.check()
