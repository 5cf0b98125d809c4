"""The tools that the benchmarks of transformers and recurrent nets compare with; none of them needs calibration data.

Every function takes a float `nn.Module` in eval mode and leaves it as it was.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


class OnnxModel:
    """An ONNX file in ONNX Runtime, called with tensors by name; gives the first output."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.path = path
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Run one batch."""
        return torch.from_numpy(self._session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


class _FirstOutput(nn.Module):
    """Takes tensors by name and gives the first tensor of the result."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], by_name: bool) -> None:
        super().__init__()
        self.model, self.names, self.by_name = model, names, by_name

    def forward(self, *inputs: Tensor) -> Tensor:
        result = self.model(**dict(zip(self.names, inputs, strict=True))) if self.by_name else self.model(*inputs)
        return result if isinstance(result, Tensor) else result[0]


def export_onnx(
    model: nn.Module, example: Mapping[str, Tensor], path: Path, *, by_name: bool = True, varying: int = 0
) -> Path:
    """Write the float model as an ONNX file with the sizes of an example, with PyTorch's own exporter.

    Args:
        model: float model in eval mode.
        example: tensors by the names that the file's inputs get.
        path: of the file to write.
        by_name: whether the model takes them as keyword arguments, or in this order.
        varying: how many of the first dimensions of every tensor may be others: none, the batch, or the length, too.
    """
    sizes = dict(enumerate([torch.export.Dim("batch"), torch.export.Dim("length")][:varying]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        torch.onnx.export(
            _FirstOutput(model, tuple(example), by_name).eval(),
            tuple(example.values()),
            str(path),
            dynamo=True,
            input_names=list(example),
            dynamic_shapes={"inputs": (sizes,) * len(example)} if varying else None,
            external_data=False,
            verbose=False,
        )
    return path


def ort_quantize_dynamic(exported: Path, path: Path) -> Path:
    """Quantize a preprocessed ONNX file with onnxruntime's `quantize_dynamic`, int8 weights per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    cleaned = path.with_suffix(".cleaned.onnx")
    with quiet():
        # Its symbolic shape inference stops at LSTMs of PyTorch's exporter.
        quant_pre_process(str(exported), str(cleaned), skip_symbolic_shape=True)
        quantization.quantize_dynamic(
            str(cleaned), str(path), per_channel=True, weight_type=quantization.QuantType.QInt8
        )
    cleaned.unlink()
    return path


def torch_ao_dynamic(model: nn.Module, kinds: set[type[nn.Module]], *, conv1d: bool = False) -> nn.Module:
    """Quantize a copy with `torch.ao.quantization.quantize_dynamic`.

    Args:
        model: float model in eval mode.
        kinds: types of layers to quantize.
        conv1d: turn GPT-2's `Conv1D`, which the tool does not know, into `nn.Linear` first.
    """
    from torch.ao.quantization import quantize_dynamic

    duplicate = copy.deepcopy(model).eval()
    if conv1d:
        _conv1d_to_linear(duplicate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(duplicate, kinds, dtype=torch.qint8)


def state_bytes(model: nn.Module, path: Path) -> int:
    """Return the bytes that a model's `state_dict` takes on disk, saved with `torch.save`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model.state_dict(), path)
    size = path.stat().st_size
    path.unlink()
    return size


def decibels(reference: Tensor, other: Tensor, *, centred: bool = False) -> float:
    """Return the signal-to-noise ratio of an output against the float model's.

    Args:
        reference: the float model's, `(..., features)`.
        other: of the same shape.
        centred: leave the mean of each feature out of both, which a bias alone can make.
    """
    signal, noise = reference.double(), reference.double() - other.double()
    if centred:
        signal, noise = (values - values.flatten(0, -2).mean(0) for values in (signal, noise))
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))


def _conv1d_to_linear(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child).__name__ == "Conv1D":
            linear = nn.Linear(*child.weight.shape)
            linear.weight = nn.Parameter(child.weight.detach().t().contiguous())
            linear.bias = child.bias
            setattr(module, name, linear)
        else:
            _conv1d_to_linear(child)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the progress lines, printed or logged, of exporters and quantization tools; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
