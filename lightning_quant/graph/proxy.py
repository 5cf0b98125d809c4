"""Proxies that answer what no input of a deployed model changes, and that record in-place arithmetic."""

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from lightning_quant.errors import UntraceableError


class ShapedProxy(fx.Proxy):
    """A proxy that knows rank, dtype and device, which no input of a deployed model changes."""

    @property
    def fake(self) -> Any:
        """The fake tensor, or other value, that stands for the traced one."""
        return self.node.meta.get("fake")

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._known("ndim")

    def dim(self) -> int:
        """Number of dimensions."""
        return self._known("ndim")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self._known("dtype")

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self._known("device")

    def is_floating_point(self) -> bool:
        """Whether the values are floating point."""
        return self._known("dtype").is_floating_point

    # Left alone, `y += x` would be traced as `y = y + x`, and other names of the same tensor would miss the change.
    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    # Python's functions of one number, which sizes are.
    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __len__(self) -> int:
        if isinstance(self.fake, tuple | list):
            return len(self.fake)
        return super().__len__()

    def __iter__(self) -> Any:
        if isinstance(self.fake, tuple | list):
            return iter([operator.getitem(self, index) for index in range(len(self.fake))])
        return super().__iter__()

    def _known(self, name: str) -> Any:
        if not isinstance(self.fake, Tensor):
            why = f" ({self.node.meta['unknown']})" if "unknown" in self.node.meta else ""
            raise UntraceableError(f"`.{name}` of a value of unknown kind is needed{why}")
        return getattr(self.fake, name)
