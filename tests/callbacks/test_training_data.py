import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_models import (
    BATCH,
    Classifier,
    ConvNet,
    EnoughError,
    equal_tensors,
    fit,
    images,
    seeded,
    tensors_of,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchmetrics import MeanMetric

from lightning_quant import PostTrainingQuantization
from lightning_quant.callbacks import training_data
from lightning_quant.callbacks.training_data import calibration_steps, capture_call, independent_copy
from lightning_quant.capture.capture import Capture
from lightning_quant.errors import CalibrationError, CaptureError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Capturing(Callback):
    """Captures at fit start, then ends the fit."""

    def __init__(self, module: str | None, example: str) -> None:
        self.module, self.example = module, example
        self.found: Capture | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = capture_call(trainer, pl_module, self.module, self.example)
        raise EnoughError


def captured(
    module: LightningModule,
    path: str | None = None,
    *,
    example: str = "train_batch",
    data: LightningDataModule | None = None,
    **options: Any,
) -> Capture:
    capturing = Capturing(path, example)
    with pytest.raises(EnoughError):
        fit(module, capturing, data=data, **options)
    assert capturing.found is not None
    return capturing.found


def first_batch(module: LightningModule) -> Any:
    return next(iter(module.train_dataloader()))


# --- which module, from a real `training_step`


class CallsItself(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)


class Distilled(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = ConvNet().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        return F.mse_loss(self.net(x), self.teacher(x))


class TwoNets(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.other = ConvNet()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x) + self.other(x), y)


def test_captures_the_child_that_training_step_calls_on_a_real_batch() -> None:
    module = Classifier()
    found = captured(module)

    assert found.path == "net"
    assert found.kwargs == {}
    assert torch.equal(found.args[0], first_batch(module)[0])


def test_captures_the_lightning_module_when_training_step_calls_self() -> None:
    module = CallsItself()
    found = captured(module)

    assert found.path == ""
    assert torch.equal(found.args[0], first_batch(module)[0])


def test_frozen_teacher_is_left_out() -> None:
    assert captured(Distilled()).path == "net"


def test_two_independent_nets_are_refused_and_one_can_be_chosen() -> None:
    with pytest.raises(CaptureError, match=r"'net' .*, 'other' .*Choose one, `module="):
        fit(TwoNets(), Capturing(None, "train_batch"))
    assert captured(TwoNets(), "other").path == "other"


def test_unknown_name_offers_the_closest_and_uncalled_module_is_refused() -> None:
    with pytest.raises(CaptureError, match="Did you mean 'net'"):
        fit(Classifier(), Capturing("nets", "train_batch"))
    with pytest.raises(CaptureError, match="to call `module` 'accuracy'"):
        fit(Classifier(), Capturing("accuracy", "train_batch"))


# --- what the batch looks like


class Doubling(Classifier):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]


class DoublingData(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(16, seed=1), BATCH)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(8, seed=2), BATCH)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]


@pytest.mark.parametrize(("module", "data"), [(Doubling(), None), (Classifier(), DoublingData())])
def test_transfer_hooks_of_module_and_datamodule_are_applied(module: Classifier, data: Any) -> None:
    raw = next(iter((data or module).train_dataloader()))[0]

    assert torch.equal(captured(module, data=data).args[0], 2 * raw + 1)


class Stack(Dataset):
    """Items of any structure, made from images and labels."""

    def __init__(self, structure: Callable[[Tensor, Tensor], Any]) -> None:
        self.images, self.structure = images(16), structure

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.structure(*self.images[index])


class Structured(Classifier):
    """`pick` finds image and label in a batch."""

    def __init__(self, structure: Any, pick: Any) -> None:
        super().__init__()
        self.structure, self.pick = structure, pick

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.pick(batch)
        return F.cross_entropy(self.net(x), y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stack(self.structure), BATCH)


@pytest.mark.parametrize(
    ("structure", "pick"),
    [
        pytest.param(lambda x, y: (x, y), lambda b: b, id="tuple"),
        pytest.param(lambda x, y: {"image": x, "label": y}, lambda b: (b["image"], b["label"]), id="dict"),
        pytest.param(
            lambda x, y: {"views": (x, {"small": x[:, ::2, ::2]}), "meta": {"label": y, "file": "name"}},
            lambda b: (b["views"][0], b["meta"]["label"]),
            id="nested",
        ),
    ],
)
def test_batches_of_any_structure(structure: Any, pick: Any) -> None:
    assert torch.equal(
        captured(Structured(structure, pick)).args[0], torch.stack([images(16)[i][0] for i in range(BATCH)])
    )


class SeveralInputs(nn.Module):
    """Takes a nested batch and keywords, as multi-modal nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()
        self.embedding = nn.Embedding(4, 4)

    def forward(self, batch: dict[str, Any], *, scale: float = 1.0) -> Tensor:
        return self.net(batch["image"]) * scale + self.embedding(batch["extra"]["token"])


class MultiModal(Structured):
    def __init__(self) -> None:
        super().__init__(lambda x, y: {"image": x, "extra": {"token": y}}, None)
        self.net = SeveralInputs()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch, scale=0.5), batch["extra"]["token"])


def test_call_with_nested_arguments_and_keywords_is_kept_as_it_was() -> None:
    found = captured(MultiModal())
    batch = next(iter(MultiModal().train_dataloader()))

    assert found.path == "net"
    assert found.kwargs == {"scale": 0.5}
    assert torch.equal(found.args[0]["image"], batch["image"])
    assert torch.equal(found.args[0]["extra"]["token"], batch["extra"]["token"])


class TwoLoaders(Classifier):
    def train_dataloader(self) -> Any:
        return {"labelled": DataLoader(images(16, seed=1), 4), "unlabelled": DataLoader(images(16, seed=5), 8)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["labelled"]
        return F.cross_entropy(self.net(torch.cat([x, batch["unlabelled"][0]]))[:4], y)


def test_several_train_loaders_are_combined() -> None:
    assert captured(TwoLoaders()).args[0].shape == (12, 1, 8, 8)


class Stream:
    """Not a DataLoader; `number` batches of ones."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Any:
        return iter([(torch.ones(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))] * self.number)


class Streamed(Classifier):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def train_dataloader(self) -> Any:
        return Stream(self.number)


def test_loaders_that_are_plain_iterables() -> None:
    assert torch.equal(captured(Streamed(1)).args[0], torch.ones(2, 1, 8, 8))


@pytest.mark.filterwarnings("ignore:Total length of:UserWarning")
def test_empty_loader_is_refused() -> None:
    with pytest.raises(CalibrationError, match="train dataloader to yield a batch, but it yields none"):
        fit(Streamed(0), Capturing(None, "train_batch"))


# --- example_input_array


class WithExample(CallsItself):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.example_input_array = example


@pytest.mark.parametrize(
    "example",
    [torch.ones(3, 1, 8, 8), (torch.ones(3, 1, 8, 8),), {"x": torch.ones(3, 1, 8, 8)}],
    ids=["tensor", "tuple", "dict"],
)
def test_example_input_array(example: Any) -> None:
    found = captured(WithExample(example), example="example_input_array")
    (recorded,) = (*found.args, *found.kwargs.values())

    assert found.path == ""
    assert torch.equal(recorded, torch.ones(3, 1, 8, 8))


def test_example_input_array_that_is_missing_is_refused() -> None:
    with pytest.raises(CaptureError, match="`example_input_array`, but it is None"):
        fit(WithExample(), Capturing(None, "example_input_array"))


class TakesIterator(CallsItself):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.ones(3, 1, 8, 8)

    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`:UserWarning")
def test_training_step_that_fetches_its_own_batches_needs_the_example() -> None:
    with pytest.raises(CaptureError, match=r"takes `dataloader_iter`\. Use `example='example_input_array'`"):
        fit(TakesIterator(), Capturing(None, "train_batch"))
    assert captured(TakesIterator(), example="example_input_array").path == ""


class GradientPenalty(Classifier):
    """Differentiates the net in its step, as gradient penalties and physics-informed losses do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x.requires_grad_()
        output = self.net(x)
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return F.cross_entropy(output, y) + gradient.square().mean()


def test_training_step_that_needs_gradients() -> None:
    module = GradientPenalty()

    assert captured(module).path == "net"
    assert all(parameter.grad is None for parameter in module.parameters())


def test_calibration_on_a_training_step_that_needs_gradients(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(output_dir=tmp_path, evaluate=False)
    fit(GradientPenalty(), callback)

    assert callback.artifact.plan["coverage"] == 1.0


# --- manual optimization


class Manual(Classifier):
    """Steps its optimizer itself, then logs; the net runs a second time after the step."""

    def __init__(self, *, toggles: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggles = toggles

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        if self.toggles:
            self.toggle_optimizer(optimizer)
        loss = F.cross_entropy(self.net(x), y)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        if self.toggles:
            self.untoggle_optimizer(optimizer)
        self.log("loss", loss)


class BackwardByHand(Manual):
    """Calls `loss.backward()` and the bare optimizer, past all of Lightning's own methods."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.net(x), y)
        optimizer.zero_grad()
        optimizer.step()
        self.log("loss", loss)


@pytest.mark.parametrize("make", [Manual, lambda: Manual(toggles=True), BackwardByHand])
def test_manual_optimization_stops_before_the_optimizer(make: Callable[[], LightningModule]) -> None:
    module = make()
    before = tensors_of(module)
    found = captured(module)

    assert found.path == "net"
    assert equal_tensors(tensors_of(module), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert not module.trainer.optimizers[0].state


# --- no trace


class Augmented(Dataset):
    """Images with noise from Python's, NumPy's and torch's global generators."""

    def __init__(self) -> None:
        self.images = images(32, seed=1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.images[index]
        x = x * random.uniform(0.8, 1.2) + float(np.random.normal(scale=0.1)) + 0.1 * torch.randn(x.shape)
        return x, y


class Drawing(Augmented):
    """Augments with a NumPy generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(5)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + float(self.generator.normal(scale=0.1)), y


class Randomized(Classifier):
    """Everything in it draws random numbers or keeps state; its loader lives as long as it does."""

    def __init__(self, dataset: type[Augmented] = Augmented) -> None:
        super().__init__(nn.Sequential(nn.Dropout(0.2), ConvNet()))
        self.loader = self.make_loader(dataset())
        self.mean_loss = MeanMetric()
        self.history: list[float] = []
        self.num_steps = 0
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def make_loader(self, data: Augmented) -> DataLoader:
        return DataLoader(data, BATCH, shuffle=True, num_workers=0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        mix = np.random.beta(2.0, 2.0)
        loss = F.cross_entropy(self.net(mix * x + (1 - mix) * x[torch.randperm(len(x))]), y)
        self.mean_loss(loss)
        self.log("train_loss", self.mean_loss, on_step=True, on_epoch=True)
        self.log("raw_loss", loss)
        self.history.append(loss.item())
        self.num_steps += 1
        self.calls += 1
        return loss

    def train_dataloader(self) -> DataLoader:
        return self.loader


class ShuffledByLoader(Randomized):
    def make_loader(self, data: Augmented) -> DataLoader:
        return DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(11), num_workers=0)


class ShuffledBySampler(Randomized):
    def make_loader(self, data: Augmented) -> DataLoader:
        return DataLoader(data, BATCH, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(11)))


class CapturingOnTheWay(Callback):
    """Captures at fit start as the quantization callbacks do, and lets the fit go on."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert capture_call(trainer, pl_module, None, "train_batch").path == "net"


def trace_of(make: Callable[[], LightningModule], *callbacks: Callback) -> dict[str, Any]:
    """Fit from fixed seeds and return all that a fit leaves behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    module = make()
    trainer = fit(module, *callbacks, max_epochs=2, log_every_n_steps=1, num_sanity_val_steps=1)
    return {
        "tensors": tensors_of(module),
        "history": module.history,
        "num_steps": module.num_steps,
        # But for what the report adds when fit has ended.
        "logged": {name: value.item() for name, value in trainer.callback_metrics.items() if name[:6] != "quant/"},
        "training": {name: child.training for name, child in module.named_modules()},
        "momentum": [state["momentum_buffer"].clone() for state in trainer.optimizers[0].state.values()],
    }


def same_trace(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if not equal_tensors(first["tensors"], second["tensors"]):
        return False
    momenta = zip(first["momentum"], second["momentum"], strict=True)
    names = ("history", "num_steps", "logged", "training")
    return all(torch.equal(a, b) for a, b in momenta) and all(first[name] == second[name] for name in names)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Randomized, id="global-generators"),
        pytest.param(ShuffledByLoader, id="loader-generator"),
        pytest.param(ShuffledBySampler, id="sampler-generator"),
        pytest.param(lambda: ShuffledByLoader(Drawing), id="dataset-generator"),
    ],
)
def test_training_is_bit_equal_with_and_without_the_capture(make: Callable[[], Randomized]) -> None:
    assert same_trace(trace_of(make), trace_of(make, CapturingOnTheWay()))


def test_a_run_that_quantizes_nothing_is_bit_equal_to_one_without_the_callback(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(output_dir=tmp_path, evaluate=False, calibration={"num_batches": 1})

    assert same_trace(trace_of(ShuffledByLoader), trace_of(ShuffledByLoader, callback))
    assert (tmp_path / "manifest.json").is_file()


def test_without_isolated_generators_the_run_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "isolated_rng", lambda seed=None: nullcontext())

    assert not same_trace(trace_of(Randomized), trace_of(Randomized, CapturingOnTheWay()))


def test_without_restoring_the_loaders_generator_the_run_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "_undisturbed", lambda loader, stack: loader)

    assert not same_trace(trace_of(ShuffledByLoader), trace_of(ShuffledByLoader, CapturingOnTheWay()))


def test_manual_optimization_is_bit_equal_with_and_without_the_capture() -> None:
    def weights(*callbacks: Callback) -> dict[str, Tensor]:
        module = seeded(Manual)
        fit(module, *callbacks)
        return tensors_of(module)

    assert equal_tensors(weights(), weights(CapturingOnTheWay()))
    assert not equal_tensors(weights(), tensors_of(seeded(Manual)))


class Preparing(Classifier):
    """Makes what `training_step` uses in the hooks that Lightning calls between fit start and the first batch."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self._prepare)

    def _prepare(self) -> None:
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_state_that_is_born_in_the_modules_own_start_hooks(hook: str) -> None:
    assert captured(Preparing(hook)).path == "net"


class TidyingUp(Preparing):
    """Takes it away when training ends."""

    def on_train_end(self) -> None:
        del self.losses


def test_calibration_misses_nothing_that_was_taken_away_when_training_ended() -> None:
    module = TidyingUp("on_train_start")
    trainer = fit(module, max_steps=1)
    duplicate = independent_copy(trainer, module)
    for step in calibration_steps(trainer, duplicate, 2, 0, "train"):
        step()

    assert len(duplicate.losses) == 2
    assert not hasattr(module, "losses")


class Logging(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.logger.log_metrics({"by_hand": loss.item()}, step=self.global_step)
        return loss


def test_nothing_reaches_the_users_logger(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    logger = CSVLogger(tmp_path)
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: logged.append(metrics))
    captured(Logging(), logger=logger)

    assert logged == []
