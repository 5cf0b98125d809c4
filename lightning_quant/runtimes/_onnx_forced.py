"""Single operators of an ONNX file, each on given integers, in one session of ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_quant.graph.named_edges import PREFIX, check_common
from lightning_quant.machine.disk import scratch_folder


def run_forced(
    path: Path, inputs: dict[str, Tensor], edges: dict[str, np.ndarray], session: Callable[[Path], Any]
) -> dict[str, np.ndarray]:
    """Run every operator on its own; as `Runtime.run_forced`.

    Args:
        path: an ONNX file in QDQ form.
        inputs: the model's own inputs by name.
        edges: integers of the quantized tensors by the names of their edges.
        session: starts a session of a file.
    """
    import onnx

    model = onnx.load(path)
    quantize = {
        node.name.removeprefix(PREFIX): node.output[0] for node in model.graph.node if node.name.startswith(PREFIX)
    }
    check_common(edges, quantize)
    cut = {name: output for name, output in quantize.items() if name in edges}
    forced = {output: f"forced_{index}" for index, output in enumerate(cut.values())}
    for node in model.graph.node:
        node.input[:] = [forced.get(name, name) for name in node.input]
    del model.graph.output[:]
    make = onnx.helper.make_tensor_value_info
    given = dict(zip(forced.values(), (edges[name] for name in cut), strict=True))
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(edge.dtype) for name, edge in given.items()}
    model.graph.output.extend(make(output, kinds[name], None) for output, name in forced.items())
    model.graph.input.extend(make(name, kinds[name], edge.shape) for name, edge in given.items())
    with scratch_folder() as folder:
        cut_file = folder / "model.onnx"
        onnx.save(model, cut_file, save_as_external_data=model.ByteSize() > 2**30)
        running = session(cut_file)
    values = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()} | given
    computed = running.run(None, {info.name: values[info.name] for info in running.get_inputs()})
    return dict(zip(cut, computed, strict=True))
