"""Modules that are not plain: made late, shared, compiled, parametrized, hooked, copied while training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from features import feature
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import (
    BATCH,
    Classifier,
    ConvNet,
    decibels,
    equal_tensors,
    fit,
    images,
    seeded,
    tensors_of,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_quant import QuantizationAwareTraining, load
from lightning_quant.simulate.prepared import RoutedForward

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


def fit_and_check(kind: Any, module: Any, folder: Path, net: str = "net", **arguments: Any) -> Any:
    """Fit, check the artifact against the module, and return the callback."""
    callback = kind(output_dir=folder, **({"evaluate": False} | arguments))
    keys = list(module.state_dict())
    fit(module, callback, max_epochs=3)
    x = images(BATCH, seed=1).tensors[0]
    with torch.no_grad():
        assert decibels(module.get_submodule(net).eval()(x), load(folder)(x)) > 12
    assert callback.artifact.report["parity"]["worst_share"] >= 0.999
    assert not any(isinstance(child.__dict__.get("forward"), RoutedForward) for child in module.modules())
    assert not keys or list(module.state_dict()) == keys
    return callback


# --- made late


class InConfigureModel(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        self.net = self.net or ConvNet()


class InSetup(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def setup(self, stage: str) -> None:
        self.net = self.net or ConvNet()


@pytest.mark.parametrize("named", [None, "net"], ids=["found", "named"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(InConfigureModel, marks=feature("Modules", "made in configure_model")),
        pytest.param(InSetup, marks=feature("Modules", "made in setup")),
    ],
)
def test_modules_made_late(kind: Any, make: type[LightningModule], named: str | None, tmp_path: Path) -> None:
    module = seeded(make)
    callback = kind(output_dir=tmp_path, module=named, evaluate=False)
    fit(module, callback, max_epochs=2)

    assert callback.path == "net"
    assert callback.artifact.plan["coverage"] == 1.0


class Lazy(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)))


class LazyButDry(Lazy):
    def configure_model(self) -> None:
        self.net(torch.zeros(1, 1, 8, 8))


@feature("Modules", "LazyLinear and LazyConv2d that have seen a batch in configure_model or setup")
def test_lazy_layers_with_shapes(kind: Any, tmp_path: Path) -> None:
    callback = fit_and_check(kind, seeded(LazyButDry), tmp_path)

    assert [row["kind"] for row in callback.artifact.plan["rows"] if row["action"] == "int8"] == ["Conv2d", "Linear"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@feature("Modules", "LazyLinear without a shape at fit start", refused="there is nothing to plan for yet")
def test_lazy_layers_without_shapes_are_refused(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"net\.0\.weight, .* are lazy.*`configure_model` or `setup`"):
        fit(seeded(Lazy), kind(output_dir=tmp_path / "artifact"))

    assert not (tmp_path / "artifact").exists()


# --- shared, parametrized, hooked


class Sharing(nn.Module):
    """One convolution under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 3, padding=1)
        self.second = self.first
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).flatten(1))


@feature("Modules", "shared submodules")
def test_shared_submodules(kind: Any, tmp_path: Path) -> None:
    module = seeded(net=Sharing())
    callback = fit_and_check(kind, module, tmp_path)

    assert module.net.first is module.net.second
    assert [row["action"] for row in callback.artifact.plan["rows"] if row["kind"] == "Conv2d"] == ["int8", "int8"]


class Parametrized(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.first = wrap(nn.Conv2d(1, 4, 3, padding=1))
        self.second = wrap(nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).flatten(1))


PARAMETRIZATIONS = [
    pytest.param(parametrizations.weight_norm, marks=feature("Modules", "weight norm, as a parametrization")),
    pytest.param(parametrizations.spectral_norm, marks=feature("Modules", "spectral norm, as a parametrization")),
    pytest.param(nn.utils.spectral_norm, marks=feature("Modules", "spectral norm, by a hook"), id="old"),
]


@pytest.mark.parametrize("wrap", PARAMETRIZATIONS)
def test_parametrized_layers_are_quantized(kind: Any, wrap: Any, tmp_path: Path) -> None:
    callback = fit_and_check(kind, seeded(net=Parametrized(wrap)), tmp_path)

    assert [row["kind"] for row in callback.artifact.plan["rows"] if row["action"] == "int8"] == [
        "Conv2d",
        "Conv2d",
        "Linear",
    ]


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_power_iterations_of_spectral_norm_are_as_many_as_in_float(tmp_path: Path) -> None:
    def train(*callbacks: Any) -> Any:
        torch.manual_seed(0)
        module = Classifier(Parametrized(parametrizations.spectral_norm))
        fit(module, *callbacks, max_epochs=2)
        return tensors_of(module)

    schedule = {"fake_quantize": 7, "freeze_observers": 8, "unit": "steps"}
    observed = train(StopAt(6), QuantizationAwareTraining(output_dir=tmp_path, schedule=schedule, evaluate=False))

    assert equal_tensors(train(StopAt(6)), observed)


@feature("Modules", "with forward hooks")
def test_hooks_run_as_often_as_in_float(kind: Any, tmp_path: Path) -> None:
    class Hooked(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []
            self.net.conv1.register_forward_hook(lambda *_: self.note("conv1"))
            self.net.register_forward_pre_hook(lambda *_: self.note("net"))

        def note(self, name: str) -> None:
            if self.trainer.training and torch.is_grad_enabled():
                self.seen.append(name)

    plain, module = seeded(Hooked), seeded(Hooked)
    fit(plain, max_epochs=3)
    fit_and_check(kind, module, tmp_path)

    assert module.seen[-len(plain.seen) :] == plain.seen
    assert len(plain.seen) == 24


class Checkpointing(nn.Module):
    """Recomputes a block in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.second, self.first(x), use_reentrant=False).flatten(1))


@feature("Modules", "torch.utils.checkpoint")
def test_activation_checkpointing(kind: Any, tmp_path: Path) -> None:
    callback = fit_and_check(kind, seeded(net=Checkpointing()), tmp_path)

    assert callback.artifact.plan["coverage"] == 1.0
    if kind is QuantizationAwareTraining:
        # Recomputing must not count a batch twice.
        assert {state["num_updates"] for state in callback.state_dict()["observers"].values()} == {10}


@feature("Modules", "dropout")
def test_dropout(kind: Any, tmp_path: Path) -> None:
    fit_and_check(kind, seeded(net=nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 4))), tmp_path)


class ChannelsLast(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.to(memory_format=torch.channels_last)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0].to(memory_format=torch.channels_last), batch[1]), batch_idx)


@feature("Modules", "channels_last")
def test_channels_last(kind: Any, tmp_path: Path) -> None:
    module = seeded(ChannelsLast)
    fit_and_check(kind, module, tmp_path)

    assert module.net.conv2.weight.is_contiguous(memory_format=torch.channels_last)


# --- compiled


class CompiledChild(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class CompiledInPlace(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


# PyTorch's compiler looks at gradients of whatever tensors it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(CompiledChild, marks=feature("Modules", "self.net = torch.compile(self.net)")),
        pytest.param(CompiledInPlace, marks=feature("Modules", "self.net.compile()")),
        pytest.param(
            lambda: torch.compile(Classifier(), backend="eager"),
            marks=feature("Modules", "torch.compile(lightning_module)"),
            id="whole",
        ),
    ],
)
def test_compiled_modules(kind: Any, make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = make()
    callback = kind(output_dir=tmp_path)
    fit(module, callback, max_epochs=3)
    inner = getattr(module, "_orig_mod", module).net
    x = images(BATCH, seed=1).tensors[0]

    assert callback.artifact.plan["coverage"] == 1.0
    assert callback.artifact.report["metrics"]
    with torch.no_grad():
        assert decibels(inner.eval()(x), load(tmp_path)(x)) > 15
    assert not any(isinstance(child.__dict__.get("forward"), RoutedForward) for child in inner.modules())


# --- what a LightningModule does with its network


class KeepsTensors(Classifier):
    """Keeps losses and logits on itself, with their history."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.loss = super().training_step(batch, batch_idx)
        self.logits = self.net(batch[0])
        self.history = [*getattr(self, "history", []), self.loss]
        self.nested = {"twice": (2 * self.loss,)}
        return self.loss


@feature("Modules", "losses and logits that a LightningModule keeps on itself")
def test_tensors_kept_on_the_module(kind: Any, tmp_path: Path) -> None:
    fit_and_check(kind, seeded(KeepsTensors), tmp_path, evaluate=True)


class MeanTeacher(Classifier):
    """Makes a copy of its network once training has begun, and lets it follow."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not hasattr(self, "teacher"):
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, 0.2)
            target = self.teacher(batch[0])
        return super().training_step(batch, batch_idx) + 0.1 * F.mse_loss(self.net(batch[0]), target)


class PhasesOfTeacher(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.updates: list[set[int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        student, teacher = (vars(net).get("forward") for net in (pl_module.net, pl_module.teacher))
        self.seen.append((student.prepared.phase, teacher.prepared.phase))
        self.updates.append({observer.num_updates for observer in student.prepared.ranges.observers.values()})


@feature("Modules", "target networks and mean teachers made by deepcopy while training")
def test_copies_made_while_training(kind: Any, tmp_path: Path) -> None:
    watch = PhasesOfTeacher()
    module = seeded(MeanTeacher)
    callback = kind(output_dir=tmp_path, module="net")
    fit(module, callback, *([watch] if kind is QuantizationAwareTraining else []), max_epochs=3)

    assert not any("forward" in child.__dict__ for child in module.modules())
    assert torch.equal(
        module.teacher.eval()(images(2).tensors[0]), ConvNet.forward(module.teacher, images(2).tensors[0])
    )
    assert not torch.equal(module.teacher.conv1.weight, module.net.conv1.weight)
    if kind is QuantizationAwareTraining:
        # The copy rounds when the original does, and moves none of its ranges: two calls of the student a batch.
        assert [student for student, _ in watch.seen] == [teacher for _, teacher in watch.seen]
        assert {phase for phase, _ in watch.seen} == {"observe", "fake_quantize", "frozen"}
        assert watch.updates[:3] == [{2}, {4}, {6}]
