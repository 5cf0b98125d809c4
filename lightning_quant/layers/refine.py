"""Round stored weights of linear layers by GPTQ, with the second moments of what the layers read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calls.calls import Call, map_tensors
from lightning_quant.layers.kernels import pack
from lightning_quant.layers.layer import StoredLayer, plain
from lightning_quant.layers.linear import StoredLinear
from lightning_quant.layers.storage import dequantize
from lightning_quant.numerics.gptq import Hessian, gptq, output_error
from lightning_quant.surgery.routing import device_of, evaluation_mode, resolve

# Hessians of more layers than fit in these bytes are made in several passes over the calls.
HESSIAN_BYTES = 4 << 30
_GRIDS = {"int8": (-127, 127), "int4": (-8, 7)}


@torch.no_grad()
def refine(root: nn.Module, layers: dict[str, StoredLayer], calls: list[Call]) -> dict[str, tuple[float, float]]:
    """Change the integers of stored weights, not their scales, to those of less output error.

    A weight that several layers share stays as it is, and so does a layer that rounding to nearest serves better.

    Args:
        root: the float module, on whatever device; there GPTQ runs.
        layers: name of every place to the layer for it; their buffers are written.
        calls: of the module; they give the inputs.

    Returns:
        name to the mean squared error of the layer's output, rounded to nearest and as it is now.
    """
    chosen = {name: layer for name, layer in layers.items() if _is_refinable(layer, layers)}
    errors: dict[str, tuple[float, float]] = {}
    for names in _affordable(root, list(chosen)):
        for name, hessian in _hessians(root, names, calls).items():
            errors[name] = _refine(plain(resolve(root, name)), chosen[name], hessian.mean)
    return errors


def _affordable(root: nn.Module, names: list[str]) -> list[list[str]]:
    """Split names of linear layers so that the Hessians of each part fit into `HESSIAN_BYTES`, if one alone does."""
    parts: list[list[str]] = []
    free = 0
    for name in names:
        needed = 8 * StoredLinear.rows(plain(resolve(root, name)), "weight").shape[1] ** 2
        if needed > free or not parts:
            parts.append([])
            free = HESSIAN_BYTES
        parts[-1].append(name)
        free -= needed
    return parts


def _hessians(root: nn.Module, names: list[str], calls: list[Call]) -> dict[str, Hessian]:
    """Run calls and return the second moments of what layers read, on the module's device."""
    hessians: dict[str, Hessian] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            hessians.setdefault(name, Hessian(x.shape[-1], x.device)).update(x)

        return see

    handles = [resolve(root, name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    device = device_of(root)
    try:
        with evaluation_mode(root), torch.random.fork_rng(devices=[]):
            for call in calls:
                args, kwargs = map_tensors(lambda tensor: tensor.to(device), call)
                root(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return hessians


def _is_refinable(layer: StoredLayer, layers: dict[str, StoredLayer]) -> bool:
    if not isinstance(layer, StoredLinear) or layer.scheme.storage not in _GRIDS:
        return False
    place = layer.stored("weight")[0].data_ptr()
    buffers = [other.stored(name)[0] for other in layers.values() for name in other.names]
    return sum(buffer.data_ptr() == place for buffer in buffers) == 1


def _refine(float_layer: nn.Module, layer: StoredLayer, hessian: Tensor) -> tuple[float, float]:
    weight = StoredLinear.rows(float_layer, "weight").detach().float()
    stored, scale = layer.stored("weight")
    # Weights as they are stored, on the CPU.
    weight = weight.to(stored.device)
    nearest = output_error(weight, dequantize(stored, scale), hessian)
    integers = gptq(weight, hessian, scale, *_GRIDS[layer.scheme.storage]).to(scale.device, torch.int8)  # type: ignore
    learned = pack(integers) if layer.scheme.storage == "int4" else integers
    error = output_error(weight, dequantize(learned, scale), hessian)
    if error < nearest:
        stored.copy_(learned)
    return nearest, min(error, nearest)
