"""What every quantized layer is: a module with stored weights in the place of a float layer."""

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from lightning_quant.layers.storage import Scheme, dequantize, quantize
from lightning_quant.surgery.routing import clone, copied, evaluation_mode

ADDED = "added_bias"
"""Name of the buffer with what takes the error of the weights out of the mean, where a layer has no bias."""
# Kinds of layers that models ask for by class. Recurrent ones keep their weights in ways of their own.
_ASKED_FOR = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


class StoredLayer(nn.Module):
    """Base of the quantized layers; by itself one that turns its weights into float at each call.

    Buffers are named after the float layer's parameters ("weight", "weight_scale"); what the layer lacks itself, such
    as `in_features` or `stride`, are the float layer's attributes.

    Attributes:
        scheme: how the weights are stored and used.
        names: the float layer's name of each stored weight to the buffer's.
        shared: the float layer's name of every other parameter, and of buffers, to the name here.
        read_beside: whether code outside the layer has asked for one of its weights.
    """

    read_beside = False

    def __init__(self, float_layer: nn.Module, scheme: Scheme, stored: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        """Take the place of a float layer, whose other parameters are shared.

        Args:
            float_layer: left as it is.
            scheme: how the weights are stored and used.
            stored: name of each weight to its stored form and scale.
        """
        super().__init__()
        self.scheme = scheme
        self.names = {name: name.replace(".", "_") for name in stored}
        for name, (weight, scale) in stored.items():
            self.register_buffer(self.names[name], weight)
            if scale is not None:
                self.register_buffer(f"{self.names[name]}_scale", scale)
        self.shared = {name: name.replace(".", "_") for name, _ in float_layer.named_parameters() if name not in stored}
        for name, attribute in self.shared.items():
            self.register_parameter(attribute, float_layer.get_parameter(name))
        for name, buffer in _buffers_of_own_forward(float_layer):
            self.shared[name] = name.replace(".", "_")
            self.register_buffer(self.shared[name], buffer)
        self.training = float_layer.training
        # Last: from here on it answers for attributes, names of buffers among them. Not registered: it has no weights.
        self.__dict__["_float_layer"] = _without_weights(float_layer)
        self.__dict__["_unreadable"] = {buffer: name for name, buffer in self.names.items()}
        if isinstance(float_layer, _ASKED_FOR):
            self.__class__ = _kind_of(type(self), type(float_layer))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kinds = type(self).__bases__ if type(self).__dict__.get("_is_made") else (type(self),)
        return _new, kinds, self.__getstate__()

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_unreadable", ()):
            self.__dict__["read_beside"] = True
            return self._poison(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_float_layer" not in self.__dict__:
                raise
            return getattr(self.__dict__["_float_layer"], name)

    @staticmethod
    def weight_names(float_layer: nn.Module) -> list[str]:
        """Return the names of the parameters that are stored: those of more than one dimension that are no biases."""
        return [
            name
            for name, parameter in float_layer.named_parameters()
            if parameter.dim() > 1 and not name.rpartition(".")[2].startswith("bias")
        ]

    @staticmethod
    def rows(float_layer: nn.Module, name: str) -> Tensor:
        """Return a weight as it is stored, rows first."""
        return float_layer.get_parameter(name)

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a layer has no such form, or an empty text."""
        if scheme.arithmetic == "integer":
            return f"no integer kernel for {type(float_layer).__name__} gives each row its own range"
        return "no 4-bit form" if scheme.storage == "int4" else ""

    @classmethod
    def multiply_adds_apart(cls, float_layer: nn.Module, args: Any, kwargs: Any) -> int:
        """Return how many multiply-adds of one call of the float layer none of its weights takes part in."""
        return 0

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the stored form of a weight and its scale."""
        weight = cast(Tensor, self._buffers[self.names[name]])
        return weight, self._buffers.get(f"{self.names[name]}_scale")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the float layer with its weights in float."""
        values = {name: dequantize(*self.stored(name)) for name in self.names}
        others = {name: getattr(self, attribute) for name, attribute in self.shared.items()}
        result = functional_call(self._float_layer, {**values, **others}, args, kwargs)
        added = self._buffers.get(ADDED)
        # Of convolutions, whose channels come before the places.
        return result if added is None else result + added.view(-1, *[1] * (values["weight"].dim() - 2))

    def add_to_bias(self, shift: Tensor) -> None:
        """Let a shift of the layer's output, `(out_channels,)`, be part of its bias, or stand for it."""
        attribute = self.shared.get("bias")
        if attribute is None:
            self.register_buffer(ADDED, shift)
        else:
            bias = self.get_parameter(attribute).detach()
            self.register_parameter(attribute, nn.Parameter(bias + shift.to(bias), requires_grad=False))

    def _poison(self, name: str) -> Tensor:
        """Return what code outside gets for a weight: its shape and type, to be asked for, and NaN for its values.

        The integers would be taken for the weight itself in `x + layer.weight`, and nobody would notice.
        """
        original = self._unreadable[name]
        parameter, device = self._float_layer.get_parameter(original), self.stored(original)[0].device
        return torch.full((), torch.nan, dtype=parameter.dtype, device=device).expand(parameter.shape)

    def extra_repr(self) -> str:
        """Say how the weights are stored."""
        return f"{type(self._float_layer).__name__}, {self.scheme.action}"


def _buffers_of_own_forward(float_layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers that a subclass's own forward may read; PyTorch's layers read none but weights."""
    is_own = not type(float_layer).forward.__module__.startswith("torch.nn.")
    return list(float_layer.named_buffers()) if is_own else []


_kinds: dict[tuple[Any, Any], Any] = {}


def _kind_of(stored: Any, kind: Any) -> Any:
    """Return a stored layer's class that is the float layer's, too, for code of the model that asks."""
    if (stored, kind) not in _kinds:
        _kinds[stored, kind] = type(stored.__name__, (stored, kind), {"_is_made": True})
    return _kinds[stored, kind]


def _new(stored: type[StoredLayer], *kind: type[nn.Module]) -> StoredLayer:
    made = _kind_of(stored, *kind) if kind else stored
    return made.__new__(made)


def from_float(
    cls: type[StoredLayer],
    float_layer: nn.Module,
    scheme: Scheme,
    group_size: int,
    known: dict[Any, Any],
    names: list[str] | None = None,
) -> StoredLayer:
    """Quantize the weights of a layer.

    Args:
        cls: which layer to make.
        float_layer: left as it is.
        scheme: how to store and use its weights.
        group_size: of 4-bit weights.
        known: weights that were stored before, so that tied ones stay tied; gets those stored now, each beside its
            float form: a computed weight that was let go would leave its address to another one.
        names: of the weights; those that the layer's class stores by default.
    """
    stored = {}
    for name in cls.weight_names(float_layer) if names is None else names:
        weight = cls.rows(float_layer, name)
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride(), scheme.storage)
        if key not in known:
            known[key] = weight, quantize(weight.detach(), scheme.storage, group_size)
        stored[name] = known[key][1]
    return cls(float_layer, scheme, stored)


def _without_weights(float_layer: nn.Module) -> nn.Module:
    """Return a copy whose parameters hold no data: shapes and attributes only."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in float_layer.parameters()
    }
    # Hooks stay with the place where the layer stood, and copies of them could copy whatever they are bound to.
    hooks = [table for table in vars(float_layer).values() if isinstance(table, OrderedDict)]
    memo |= {id(table): OrderedDict() for table in hooks}
    return copied(float_layer, memo).eval()


def plain(float_layer: nn.Module) -> nn.Module:
    """Return a layer whose weights are parameters: itself, or a copy where parametrizations or hooks compute them."""
    parametrized = list(float_layer.parametrizations) if parametrize.is_parametrized(float_layer) else []  # type: ignore
    # As `torch.nn.utils.weight_norm`, `spectral_norm` and `prune` leave them.
    sources = ("_g", "_v", "_orig")
    by_hooks = [
        name
        for name, value in vars(float_layer).items()
        if isinstance(value, Tensor) and any(f"{name}{source}" in float_layer._parameters for source in sources)
    ]
    if not parametrized and not by_hooks:
        return float_layer
    duplicate = clone(float_layer)
    if parametrized:
        # Not by `remove_parametrizations`, which would write into the shared parameters.
        del duplicate.parametrizations
        duplicate.__class__ = type(float_layer).__bases__[0]
    for name in (*parametrized, *by_hooks):
        # In training, spectral norm goes on with its iterations whenever somebody looks.
        with evaluation_mode(float_layer):
            value = getattr(float_layer, name).detach()
        for source in [source for source in duplicate._parameters if source.startswith(f"{name}_")]:
            del duplicate._parameters[source]
        duplicate.__dict__.pop(name, None)
        duplicate.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for key in [key for key, hook in duplicate._forward_pre_hooks.items() if computes_weight(hook)]:
        del duplicate._forward_pre_hooks[key]
    return duplicate


def computes_weight(hook: Any) -> bool:
    """Tell whether a forward pre-hook is one of PyTorch's that compute a weight from other parameters."""
    return type(hook).__module__.startswith("torch.nn.utils.")
