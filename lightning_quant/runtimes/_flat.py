"""A module over flat tensors, as model files have them, and how exporters are called on it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.signature import Signature, output_names, tensor_leaves
from lightning_quant.errors import ArtifactError, ExportError, QuantizationError
from lightning_quant.layers.packed import kept_padded
from lightning_quant.machine.disk import disk_refusal
from lightning_quant.runtimes._allowances import allowances
from lightning_quant.runtimes._reasons import first_line, reason, sizes_watched
from lightning_quant.surgery.compilation import scripted_part
from lightning_quant.surgery.foreign_operators import ForeignOperatorsInlined
from lightning_quant.surgery.process import alone
from lightning_quant.surgery.routing import as_exported

# What a file says of its inputs, and of its outputs.
Forms = tuple[list[dict[str, Any]], list[dict[str, Any]]]


class Flat(nn.Module):
    """Takes and gives flat tensors, as model files do.

    Raises:
        ExportError: a part of the module is none that `torch.export` takes.
    """

    def __init__(self, module: nn.Module, call: CapturedCall) -> None:
        super().__init__()
        if name := scripted_part(module):
            raise ExportError(
                f"Expected modules of Python code, but {name!r} is scripted or traced, which `torch.export` does not "
                "take. Give the module as it was before `torch.jit`, or a child without that part."
            )
        self.module, self.call = module, call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the module on these tensors in place of the captured ones."""
        args, kwargs = self.call.bind(tensors)
        return tuple(tensor_leaves(self.module(*args, **kwargs)))


def example_tensors(call: CapturedCall) -> list[Tensor]:
    """Return the captured tensors on the CPU, at least two long along dynamic dimensions."""
    return [_widen(t, call.dynamic.get(name, {})).cpu() for name, t in zip(call.names, call.tensors, strict=True)]


def dynamic_shapes(call: CapturedCall, limits: dict[str, int] | None = None) -> tuple[Any, ...] | None:
    """Return what `torch.export` wants to know of the dimensions that may vary, up to limits; None when none may."""
    names = {name for dimensions in call.dynamic.values() for name in dimensions.values()}
    dims = {name: torch.export.Dim(name, max=(limits or {}).get(name)) for name in names}
    shapes = tuple({i: dims[n] for i, n in call.dynamic.get(name, {}).items()} or None for name in call.names)
    return (shapes,) if any(shapes) else None


def forms_of_call(flat: Flat, examples: tuple[Tensor, ...]) -> Forms:
    """Return what a file should say of its inputs (name, dtype, sizes, None for any) and outputs (name, dtype)."""
    args, kwargs = flat.call.bind(examples)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), as_exported():
        result = flat.module(*args, **kwargs)
    inputs = [
        _form(name, t)
        | {"shape": [None if i in flat.call.dynamic.get(name, {}) else size for i, size in enumerate(t.shape)]}
        for name, t in zip(flat.call.names, examples, strict=True)
    ]
    names = output_names(result, flat.call.names)
    return inputs, [_form(name, t) for name, t in zip(names, tensor_leaves(result), strict=True)]


def forms_of_signature(signature: Signature) -> Forms:
    """Return what a file that fits a signature says."""
    inputs = [
        {"name": i.name, "dtype": i.dtype, "shape": [s if isinstance(s, int) else None for s in i.shape]}
        for i in signature.inputs
    ]
    return inputs, [{"name": info.name, "dtype": info.dtype} for info in signature.outputs]


def check_forms(program: dict[str, Any], signature: Signature, path: Path) -> None:
    """Make sure that a program's inputs and outputs are those of a signature.

    Raises:
        ArtifactError: they are not.
    """
    inputs, outputs = forms_of_signature(signature)
    if [program["inputs"], program["outputs"]] != [inputs, outputs]:
        raise ArtifactError(
            f"Expected {path} to have the inputs and outputs of its signature, but {program['inputs']!r:.200} and "
            f"{program['outputs']!r:.200} are not {inputs} and {outputs}."
        )


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ArtifactError: the file is something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    # Of types that PyTorch does not have it raises KeyError.
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"Expected {path} to hold the tensors of a model, but {first_line(error)}.") from error


@contextlib.contextmanager
def exporting(engine: str, names: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Let an exporter work quietly and without gradients; what it refuses becomes an error of ours.

    Args:
        engine: what is at work, for messages.
        names: of the inputs, in order.

    Yields:
        the places in the user's code that have made a constant of a size that may vary.

    Raises:
        ExportError: the exporter raised; the message has its reason, the place in the user's code, and the way out.
        OSError: the disk does not take what it writes.
    """
    with sizes_watched() as fixed:
        try:
            with quiet(), torch.no_grad(), as_exported(), kept_padded(), ForeignOperatorsInlined(), allowances():
                yield fixed
        except QuantizationError:
            raise
        except Exception as error:
            # Exporters raise errors of any class, some of their own that derive from nothing narrower.
            if (refusal := disk_refusal(error)) is not None:
                raise refusal from error
            raise refused(engine, reason(error, names, fixed)) from error


def refused(engine: str, why: str) -> ExportError:
    """Return the error that says why an exporter does not take a module."""
    return ExportError(
        f"Expected {engine} to take the module, but it says: {why}. Change that place, name a child module that "
        'exports (`module="..."`), exclude what does not, or choose another runtime.'
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter: what it says of missing packages and of itself, and whole graphs when it refuses one."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            alone(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _form(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": str(tensor.dtype).removeprefix("torch.")}


def _widen(tensor: Tensor, dimensions: dict[int, str]) -> Tensor:
    """Repeat a tensor to size 2 along dynamic dimensions of size 1, which the exporter would take for constants."""
    repeats = [2 if index in dimensions and size == 1 else 1 for index, size in enumerate(tensor.shape)]
    return tensor.detach().repeat(repeats) if 2 in repeats else tensor.detach()
