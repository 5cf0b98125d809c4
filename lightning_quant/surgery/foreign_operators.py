"""Operators of other libraries while a module is exported: replaced by what they compute."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ForeignOperatorsInlined(TorchFunctionMode):
    """Lets an exporter see what operators of other libraries compute, where they are written in Python.

    PyTorch's exporters keep such operators whole, and no file of ours could call them. Products of groups of rows,
    which PyTorch traces for bfloat16 alone and Hugging Face's mixtures of experts hide in an operator of theirs, become
    one of this package.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(function)
        if name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback"):
            product = _grouped(*args, **kwargs)
            if product is not None:
                return product
        python = _written_in_python(name)
        if python is None:
            return function(*args, **kwargs)
        # One may call another.
        with self:
            return python(*args, **kwargs)


def _name(function: Any) -> str:
    if function is getattr(torch, "_grouped_mm", None):
        return "aten::_grouped_mm"
    if isinstance(function, torch._ops.OpOverload):
        return function.name().partition(".")[0]
    return function._qualified_op_name if isinstance(function, torch._ops.OpOverloadPacket) else ""


def _grouped(
    x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None, **_: Any
) -> torch.Tensor | None:
    import lightning_quant.layers  # noqa: F401  defines the operator

    if offs is None or x.dim() != 2 or weight.dim() != 3:
        return None
    product = torch.ops.lightning_quant.grouped_product(x, weight, offs)
    product = product if bias is None else product + bias
    return product if out_dtype is None else product.to(out_dtype)


def _written_in_python(name: str) -> Any:
    """Return the function behind an operator made by `torch.library.custom_op`; None where there is none."""
    from torch._library.custom_ops import OPDEFS

    definition = OPDEFS.get(name)
    return None if definition is None else definition._init_fn
