"""The tools that the benchmarks compare with, each quantizing the same float model with the same calibration tensors.

Every function takes a float `nn.Module` in eval mode with one tensor input, leaves it as it was, and returns a
callable from a batch of inputs to a batch of outputs, a list of them where the model has several. PyTorch's own models
use `torch.get_num_threads()` threads; the other runtimes take the number as `threads`.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Predictor = Callable[[Tensor], Tensor]


class _SingleInput(nn.Module):
    """Calls the model with its first argument alone, so that optional arguments are not traced as inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


class OrtModel:
    """An ONNX file in ONNX Runtime, called like the model it was exported from."""

    def __init__(self, model_path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.model_path = model_path
        self._session = onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        self._input_name = self._session.get_inputs()[0].name

    def __call__(self, inputs: Tensor) -> Any:
        """Run one batch of any size."""
        return results_of(self._session.run(None, {self._input_name: inputs.numpy()}))


class OpenVinoModel:
    """A model of OpenVINO's in OpenVINO, called like the module it was exported from.

    Attributes:
        model: the `openvino.Model`.
    """

    def __init__(self, model: Any, threads: int) -> None:
        import openvino

        self.model = model
        self._compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads})

    def __call__(self, inputs: Tensor) -> Any:
        """Run one batch of any size."""
        return results_of([result.copy() for result in self._compiled(inputs.numpy()).values()])


def results_of(outputs: Sequence[Any]) -> Any:
    """Return an engine's arrays as tensors, one alone where there is one."""
    tensors = [torch.from_numpy(output) for output in outputs]
    return tensors[0] if len(tensors) == 1 else tensors


def ort_float(model: nn.Module, example: Tensor, path: Path, threads: int = 1, *, one_size: bool = False) -> OrtModel:
    """Export the float model to ONNX file `path` and run it in ONNX Runtime.

    Args:
        model: float model in eval mode.
        example: `(N, ...)`; every size but the first is fixed.
        path: of the file to write.
        threads: of the session.
        one_size: whether the first is fixed, too.
    """
    return OrtModel(_export(model, example, path, one_size=one_size), threads)


def openvino_float(path: Path, threads: int = 1) -> OpenVinoModel:
    """Run a float ONNX file in OpenVINO with its default settings, bfloat16 on CPUs with AMX."""
    import openvino

    return OpenVinoModel(openvino.Core().read_model(str(path)), threads)


def ort_quantize_static(
    model: nn.Module,
    calibration: Sequence[Tensor],
    path: Path,
    method: str = "MinMax",
    threads: int = 1,
    *,
    exported: Path | None = None,
    symbolic_shapes: bool = True,
) -> OrtModel:
    """Quantize with onnxruntime's `quantize_static`: QDQ, int8 weights per channel, uint8 activations.

    Args:
        model: float model in eval mode.
        calibration: batches, `(N, ...)` each.
        path: of the int8 file to write; the float file is written beside it.
        method: `"MinMax"`, `"Percentile"` or `"Entropy"`, with onnxruntime's default settings.
        threads: of the session.
        exported: the float model as an ONNX file, where there is one.
        symbolic_shapes: whether onnxruntime infers them beforehand, which some models do not get through.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    exported = exported or _export(model, calibration[0], path.with_suffix(".float.onnx"))
    cleaned = path.with_suffix(".cleaned.onnx")
    with _quiet():
        quant_pre_process(str(exported), str(cleaned), skip_symbolic_shape=not symbolic_shapes)
        quantization.quantize_static(
            str(cleaned),
            str(path),
            _batches(calibration, OrtModel(exported, 1)._input_name),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )
    return OrtModel(path, threads)


def torch_ao_fx(model: nn.Module, calibration: Sequence[Tensor], engine: str = "x86") -> Predictor:
    """Quantize with `torch.ao.quantization`, FX graph mode and the default settings of `engine`.

    Args:
        model: float model in eval mode.
        calibration: batches, `(N, ...)` each.
        engine: one of `torch.backends.quantized.supported_engines`.
    """
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with _torch_ao_noise(), torch.no_grad():
        torch.backends.quantized.engine = engine
        settings = quantization.get_default_qconfig_mapping(engine)
        prepared = prepare_fx(_SingleInput(copy.deepcopy(model)).eval(), settings, (calibration[0],))
        for batch in calibration:
            prepared(batch)
        converted = convert_fx(prepared)

    def predict(inputs: Tensor) -> Tensor:
        torch.backends.quantized.engine = engine
        with torch.no_grad():
            return converted(inputs)

    return predict


def torch_ao_qat(model: nn.Module, example: Tensor, engine: str = "x86") -> nn.Module:
    """Prepare a copy of the model for training with `torch.ao.quantization` FX: observing and fake-quantizing."""
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with _torch_ao_noise():
        settings = quantization.get_default_qat_qconfig_mapping(engine)
        return prepare_qat_fx(_SingleInput(copy.deepcopy(model)).train(), settings, (example,))


def freeze_observers(prepared: nn.Module) -> nn.Module:
    """Stop the observers of a model from `torch_ao_qat`, in place; fake quantization goes on."""
    from torch.ao import quantization

    return prepared.apply(quantization.disable_observer)


def nncf_quantize(
    model: nn.Module, calibration: Sequence[Tensor], path: Path, threads: int = 1, *, exported: Path | None = None
) -> OpenVinoModel:
    """Quantize with NNCF's default post-training settings and run in OpenVINO.

    NNCF gives the inputs of depthwise convolutions one scale per channel; OpenVINO then runs those convolutions not in
    int8 but in floating point, bfloat16 on CPUs with AMX.

    Args:
        model: float model in eval mode.
        calibration: batches, `(N, ...)` each.
        path: of the float ONNX file to write and to quantize, unless it is given.
        threads: of the compiled model.
        exported: the float model as an ONNX file, where there is one.

    Raises:
        ModuleNotFoundError: when `nncf` or `openvino` is not installed.
    """
    import nncf
    import openvino

    float_model = openvino.Core().read_model(str(exported or _export(model, calibration[0], path)))
    with _quiet():
        dataset = nncf.Dataset([batch.numpy() for batch in calibration])
        quantized = nncf.quantize(float_model, dataset, subset_size=len(calibration))
    return OpenVinoModel(quantized, threads)


def operator_counts(model_path: Path, optimized_path: Path) -> Counter[str]:
    """Count the operators that ONNX Runtime really runs, after its own graph optimization.

    Args:
        model_path: of the ONNX file.
        optimized_path: of the optimized file to write.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized_path)
    options.log_severity_level = 3  # it warns that the optimized file suits this machine only, which is the point
    onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(optimized_path)).graph.node)


def _export(model: nn.Module, example: Tensor, path: Path, *, one_size: bool = False) -> Path:
    """Write the float model as an ONNX file, with a dynamic batch unless it has one size alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    two = torch.cat([example, example])[:2]  # an example of batch size 1 would fix the size
    with _quiet():
        torch.onnx.export(
            _SingleInput(model).eval(),
            (example if one_size else two,),
            str(path),
            dynamo=True,
            dynamic_shapes=None if one_size else ({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    return path


def _batches(calibration: Sequence[Tensor], input_name: str) -> Any:
    """Wrap the batches in the reader that onnxruntime's calibration asks for."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {input_name: batch.numpy()}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress lines, printed or logged, of exporters and quantization tools; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _torch_ao_noise() -> Iterator[None]:
    """Silence what `torch.ao.quantization` says about its own deprecation, dtypes and defaults."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*reduce_range.*")
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*deprecated.*")
        yield
