"""Put quantized layers into the places of float ones, for good or while a block runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.parameters import CHILD, FloatParameters, StoredParameters
from lightning_quant.surgery.routing import resolve, route, unroute

# Where PyTorch's encoders say whether their fused kernels may run.
_FAST_PATH = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


def place(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers in the places of those names; hooks of what stood there move with the place."""
    for name, layer in layers.items():
        owner, _, attribute = name.rpartition(".")
        parent = resolve(root, owner)
        if isinstance(layer, StoredParameters | FloatParameters):
            layer.put_in(parent)
            continue
        old = parent._modules[attribute]
        for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            setattr(layer, hooks, getattr(old, hooks))
        parent._modules[attribute] = layer
    _set_fast_path(root)


def _set_fast_path(root: nn.Module) -> None:
    """Keep stored weights from PyTorch's fused encoder kernels, which are for float; give those back afterwards."""
    for module in root.modules():
        for kind, switch in _FAST_PATH.items():
            if isinstance(module, kind) and hasattr(module, switch):
                before = module.__dict__.pop("_before_layers", None)
                if before is not None:
                    setattr(module, switch, before)
                if any(isinstance(child, StoredLayer) for child in module.modules()):
                    module.__dict__["_before_layers"] = getattr(module, switch)
                    setattr(module, switch, type(getattr(module, switch))(0))


@contextmanager
def placed(root: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Put layers in the places of those names, yield what stood there, and put that back at the end.

    The root itself, which has no place, is routed to its layer.
    """
    inner = {name: layer for name, layer in layers.items() if name}
    before = {name: standing(root, name) for name in inner}
    if "" in layers:
        route(root, layers[""].forward)
    place(root, inner)
    try:
        yield before
    finally:
        place(root, before)
        if "" in layers:
            unroute(root)


def standing(root: nn.Module, name: str) -> nn.Module:
    """Return what stands in a place: a layer, or a module's own parameters."""
    owner, _, attribute = name.rpartition(".")
    parent = resolve(root, owner)
    return FloatParameters(parent) if attribute == CHILD and CHILD not in parent._modules else resolve(root, name)
