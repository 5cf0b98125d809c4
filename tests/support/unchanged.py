"""Modules as they were before."""

from typing import Any

from lightning_models import equal_tensors, tensors_of
from torch import nn


class State:
    """What of a module must not change, taken now and compared later."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tensors = model, tensors_of(model)
        self.seen = self._look()

    def _look(self) -> list[Any]:
        return [
            (
                name,
                id(module),
                module.training,
                sorted(module.__dict__),
                [list(table) for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)],
                [
                    (key, id(value), value.requires_grad)
                    for key, value in module._parameters.items()
                    if value is not None
                ],
                [(key, id(value)) for key, value in module._buffers.items()],
            )
            for name, module in self.model.named_modules(remove_duplicate=False)
        ]

    def assert_unchanged(self) -> None:
        assert self._look() == self.seen
        assert equal_tensors(tensors_of(self.model), self.tensors)
