"""Where planning, trial export, conversion and measuring happen: on the CPU, in float32, whatever was trained where.

Artifacts run on the CPU, and exporters, kernels and files know nothing of accelerators. So the stages that make and
measure them work on a copy here, on tensors that they have moved themselves. Training, calibration, simulation and
search stay on the module's device.
"""

import ctypes
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.calls.calls import Call
from lightning_quant.surgery.routing import clone

HOST = torch.device("cpu")


def copied_to(module: nn.Module, device: torch.device, *, in_float32: bool = True, unrouted: bool = False) -> Any:
    """Return an independent copy of a module on a device, in float32 unless that is not wanted; ties are kept.

    Tensors are moved one by one, so that neither side ever holds the model twice. Those that are there already are
    shared, if they are parameters. Attributes that name the old device name the new one.
    """
    duplicate = clone(module, unrouted=unrouted, convert=lambda t: moved(t, device, in_float32=in_float32))
    old = {tensor.device for tensor in (*module.parameters(), *module.buffers())} - {device}
    spellings = {str(one) for one in old} | {one.type for one in old}
    for child in duplicate.modules():
        for name, value in vars(child).items():
            if isinstance(value, torch.device) or (isinstance(value, str) and value in spellings):
                child.__dict__[name] = device if isinstance(value, torch.device) else str(device)
    return duplicate


def on_host(module: nn.Module) -> Any:
    """Return a module that is on the CPU in float32: itself, or a copy that is, with every forward its own."""
    return module if _is_there(module) else copied_to(module, HOST, unrouted=True)


def device_for_search(device: torch.device) -> torch.device:
    """Return where calibration and search can run for a module there: statistics need double precision."""
    return HOST if device.type == "mps" else device


def moved(tensor: Tensor, device: torch.device = HOST, *, in_float32: bool = True) -> Tensor:
    """Return a tensor on a device, a floating-point one in float32 unless that is not wanted; itself if it is so."""
    if tensor.is_meta:
        return tensor
    same_type = not in_float32 or tensor.dtype == torch.float32 or not tensor.is_floating_point()
    if tensor.device == device and same_type:
        return tensor
    values = tensor.detach()
    # The wider copy is made on the host where that is one of the two.
    if not same_type:
        values = values.float() if device != HOST else values.to(device).float()
    values = values.to(device)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def moved_call(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device = HOST) -> Call:
    """Return the arguments of a call with all tensors in float32 on a device, and that one where they name another."""
    call = Call(args, kwargs).map(lambda tensor: moved(tensor, device))
    return Call(*pytree.tree_map_only(torch.device, lambda _: device, tuple(call)))


def _is_there(module: nn.Module) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return all(t.device == HOST and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors)


def give_back_memory() -> None:
    """Give freed memory back to the system, where an allocator would keep it."""
    # glibc keeps what was freed in pieces of a few megabytes: a fifth of the float model's bytes, as measured.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
