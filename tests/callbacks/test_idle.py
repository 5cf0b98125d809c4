"""A callback that is idle costs nothing: operators and hooks are counted, not timed."""

from pathlib import Path
from typing import Any

import pytest
from features import feature
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_models import fit, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


class Operators(TorchDispatchMode):
    """Names every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Counting(Callback):
    """Counts operators, hooks and routed forwards of every training step; comes last in the list."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        self.hooks: list[int] = []
        self.routed: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        modules = list(pl_module.modules())
        self.hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules))
        self.routed.append(any("forward" in m.__dict__ for m in modules))
        self.mode = Operators()
        self.mode.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.steps.append(self.mode.names)


def counted(*callbacks: Any, **options: Any) -> Counting:
    counting = Counting()
    fit(seeded(), *callbacks, counting, **({"max_epochs": 2} | options))
    return counting


@feature("Cost", 'nothing while the phase is "off"', only="QAT")
def test_a_phase_that_is_off_adds_no_operator_and_no_hook(tmp_path: Path) -> None:
    schedule = {"observe": 5, "fake_quantize": 6, "freeze_observers": 7, "unit": "steps"}
    idle = counted(QuantizationAwareTraining(output_dir=tmp_path, schedule=schedule, evaluate=False))
    plain = counted()

    assert idle.steps[:5] == plain.steps[:5]
    assert idle.routed == [False] * 5 + [True] * 3
    assert set(idle.hooks) == {0}
    # From the sixth batch on there is something to count, so counting would have shown it before.
    assert len(idle.steps[5]) > len(plain.steps[5])
    assert len(idle.steps[6]) > len(idle.steps[5])


@feature("Cost", "nothing during training in post-training quantization, and nothing after fit")
def test_a_finished_callback_adds_no_operator_and_no_hook(kind: Any, tmp_path: Path) -> None:
    module, plain = seeded(), seeded()
    fit(module, kind(output_dir=tmp_path, evaluate=False))
    fit(plain)
    after, expected = Counting(), Counting()
    fit(module, after)
    fit(plain, expected)

    assert after.steps == expected.steps
    assert after.hooks == [0] * 4
    assert after.routed == [False] * 4


@feature("Cost", "training itself is not touched", only="PTQ")
def test_post_training_quantization_adds_nothing_while_training(tmp_path: Path) -> None:
    idle = counted(PostTrainingQuantization(output_dir=tmp_path, evaluate=False))

    assert idle.steps == counted().steps
    assert set(idle.hooks) == {0}
    assert not any(idle.routed)
