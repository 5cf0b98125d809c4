"""What `training_step` makes of the module to quantize, and what it computes beside it."""

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_quant.callbacks.training_data import batches, independent_copy, run_training_step, start_hooks
from lightning_quant.capture.capture import isolated_rng, unchanged
from lightning_quant.graph.counting import counted
from lightning_quant.graph.operations import WEIGHTED, kind_of
from lightning_quant.surgery.routing import resolve


@dataclass(frozen=True)
class Step:
    """What `training_step` makes of the module to quantize.

    Attributes:
        beside: layers of the module that the step also calls past the module's own forward: they stay float, whatever
            is quantized, as in `self.net.forward_features(x)` beside `self.net(x)`.
        share: share of the multiply-adds of the step's forward that the module makes, in [0, 1].
    """

    beside: tuple[str, ...] = ()
    share: float = 1.0


def observe_step(trainer: Trainer, pl_module: LightningModule, path: str) -> Step:
    """Run `training_step` once and see what it calls beside the module at `path`."""
    duplicate = independent_copy(trainer, pl_module)
    inside, beside = [0], dict[str, None]()
    module = resolve(duplicate, path)
    for name, layer in module.named_modules():
        if kind_of(layer) in WEIGHTED and layer is not module:
            layer.register_forward_pre_hook(
                lambda *_, name=name: None if inside[0] else beside.setdefault(f"{path}.{name}".lstrip("."))
            )
    module.register_forward_pre_hook(lambda *_: inside.__setitem__(0, inside[0] + 1), prepend=True)
    module.register_forward_hook(lambda *_: inside.__setitem__(0, inside[0] - 1), always_call=True)
    with isolated_rng(), unchanged(pl_module), torch.enable_grad(), counted(duplicate) as observed:
        for batch in batches(trainer, pl_module, 1):
            start_hooks(duplicate, batch)
            with trainer.precision_plugin.train_step_context():
                run_training_step(duplicate, batch, 0)
    return Step(tuple(beside), observed.share(path))
