"""A module with one captured call and the plan for it: what every way of quantizing starts from."""

import inspect
from typing import Any

from torch import Tensor, nn

from lightning_quant.calls import CallSpec, flatten_call, rebuild_call
from lightning_quant.graph.plan import Plan


class CapturedModel:
    """Base of `Prepared`, for recipes that need a graph, and of `Layerwise`, for those that need none.

    Attributes:
        root: the float module; it owns every parameter and buffer.
        signature: of the module's own forward; with `spec` and `tensors` it is the captured call.
        spec: what of the call is tensors and what is constant.
        tensors: the call's tensors, on the CPU in float32.
        plan: what happens to each layer, and why.
        varying: `(input, dimension)` whose size differed from the captured call in some call since.
    """

    root: nn.Module
    signature: inspect.Signature
    spec: CallSpec
    tensors: list[Tensor]
    plan: Plan
    varying: set[tuple[str, int]]

    def call(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs of the captured call with these tensors in place of its own."""
        return rebuild_call(self.signature, self.spec.arguments(list(tensors)))

    def on_host(self) -> "CapturedModel":
        """Return the same over a float32 module on the CPU, where it is converted and measured: itself if it is so."""
        raise NotImplementedError

    def note_sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember in which dimensions another call differs from the captured one."""
        spec, tensors = flatten_call(self.signature, args, kwargs)
        self.note_sizes_of(spec.names, tensors)

    def note_sizes_of(self, names: tuple[str, ...], tensors: list[Tensor]) -> None:
        """Remember in which dimensions tensors of these names differ from those of the captured call."""
        sizes = {name: tensor.shape for name, tensor in zip(self.spec.names, self.tensors, strict=True)}
        for name, tensor in zip(names, tensors, strict=True):
            if len(sizes.get(name, ())) == tensor.dim():
                self.varying.update((name, d) for d in range(tensor.dim()) if tensor.shape[d] != sizes[name][d])
