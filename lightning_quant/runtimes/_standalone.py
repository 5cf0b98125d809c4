"""Lines of code that call a model file without this package, for reports."""

from lightning_quant.calls.signature import Signature, TensorInfo
from lightning_quant.terminal.tables import one_line


def numpy_inputs(signature: Signature) -> str:
    """Return the lines that make a dict of NumPy inputs of the captured types, with one sample of zeros each."""
    lines = [
        f"    {info.name!r}: np.zeros({_example(info)}, np.{_dtype(info)}),{_comment(info)}"
        for info in signature.inputs
    ]
    return "\n".join(["inputs = {", *lines, "}"])


def torch_inputs(signature: Signature) -> str:
    """Return the lines that make a dict of torch inputs, likewise."""
    lines = [
        f"    {info.name!r}: torch.zeros({_example(info)}, dtype=torch.{info.dtype}),{_comment(info)}"
        for info in signature.inputs
    ]
    return "\n".join(["inputs = {", *lines, "}"])


def _example(info: TensorInfo) -> tuple[int, ...]:
    return tuple(1 if isinstance(size, str) else size for size in info.shape)


def _dtype(info: TensorInfo) -> str:
    return "bool_" if info.dtype == "bool" else info.dtype


def _comment(info: TensorInfo) -> str:
    free = [f"{one_line(size)} = axis {axis}" for axis, size in enumerate(info.shape) if isinstance(size, str)]
    return f"  # any size: {', '.join(free)}" if free else ""
