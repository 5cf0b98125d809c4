"""Single operators of an OpenVINO model, each on given integers, in one compiled model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_quant.graph.named_edges import PREFIX, check_common


def run_forced(
    path: Path, inputs: dict[str, Tensor], edges: dict[str, np.ndarray], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Run every operator on its own; as `Runtime.run_forced`, compiled with `config`."""
    import openvino
    from openvino import opset13

    core = openvino.Core()
    model = core.read_model(path)
    quantized = {
        op.get_friendly_name().removeprefix(PREFIX): op
        for op in model.get_ordered_ops()
        if op.get_friendly_name().startswith(PREFIX) and op.get_output_element_type(0) == openvino.Type.u8
    }
    check_common(edges, quantized)
    cut = {name: op for name, op in quantized.items() if name in edges}
    parameters, results = list(model.get_parameters()), []
    for name, op in cut.items():
        output = op.output(0)
        forced = opset13.parameter(list(edges[name].shape), np.uint8, name=f"forced {name}")
        for reader in list(output.get_target_inputs()):
            reader.replace_source_output(forced.output(0))
        parameters.append(forced)
        results.append(opset13.result(output))
    running = core.compile_model(openvino.Model(results, parameters), "CPU", {**config, "INFERENCE_NUM_THREADS": 1})
    own = [inputs[port.get_node().get_friendly_name()].detach().cpu().numpy() for port in model.inputs]
    computed = running([*own, *(edges[name] for name in cut)])
    return dict(zip(cut, (np.array(computed[port]) for port in running.outputs), strict=True))
