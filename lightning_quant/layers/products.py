"""Which parameters a call multiplies by: weights of matrix products, not tables of positions or gains."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant.surgery.routing import evaluation_mode, without_fast_path

_PRODUCTS = frozenset({
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "linear", "matmul", "_grouped_mm", "_scaled_mm",
    "grouped_mm_fallback", "convolution", "_trilinear", "_addmm_activation", "mkldnn_rnn_layer",
})  # fmt: skip
# They move the values of a weight, or some of them, into a tensor of its own.
_MOVES = frozenset(
    {"index", "index_select", "gather", "embedding", "clone", "_to_copy", "_unsafe_view", "cat", "stack"}
)
# Smaller weights are not worth a scale of their own.
MIN_VALUES = 1024


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module, parameters: dict[int, nn.Parameter]) -> None:
        super().__init__()
        # Address of the memory to the parameters whose values lie there; the tensors are kept, or their addresses
        # would be given to others.
        self.known: dict[int, set[int]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            own = {id(tensor)} & parameters.keys()
            self.known.setdefault(tensor.untyped_storage().data_ptr(), set()).update(own)
        self.kept: list[Tensor] = []
        self.multiplied: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().rpartition("::")[2].partition(".")[0]
        given = [self.known.get(t.untyped_storage().data_ptr()) for t in _tensors((args, kwargs))]
        read = set[int]().union(*filter(None, given))
        if name in _PRODUCTS:
            self.multiplied |= read
        # What is computed of weights alone, as in weight standardization, is a weight.
        if (read and (name in _MOVES or self._scales(name, args, result))) or (given and None not in given):
            for tensor in _tensors(result):
                self.known.setdefault(tensor.untyped_storage().data_ptr(), set()).update(read)
                self.kept.append(tensor)
        return result

    def _scales(self, name: str, args: tuple[Any, ...], result: Any) -> bool:
        """Tell whether weights are scaled for each sample, as by Karras et al. 2020 (arXiv:1912.04958), equation 1.

        What scales them is as large in fewer dimensions; values that a gain scales are as large as the gain.
        """
        others = [t for t in _tensors(args) if not self.known.get(t.untyped_storage().data_ptr())]
        return name == "mul" and len(others) == 1 and 1 < others[0].numel() < result.numel()


def multiplied(model: nn.Module, owners: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Return the ids of the owners' own parameters that one call of a model multiplies by.

    Args:
        model: the float module.
        owners: modules in it that hold parameters themselves.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    own = {
        id(parameter): parameter
        for owner in owners
        for parameter in owner.parameters(recurse=False)
        if parameter.dim() > 1 and parameter.numel() >= MIN_VALUES and parameter.is_floating_point()
    }
    if not own:
        return set()
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        evaluation_mode(model),
        without_fast_path(),
        _Watch(model, own) as watch,
    ):
        model(*args, **kwargs)
    return watch.multiplied


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
