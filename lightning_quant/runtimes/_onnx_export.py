"""A module as an ONNX file: the form that ONNX Runtime runs and that OpenVINO reads."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.signature import output_names
from lightning_quant.graph.named_edges import PREFIX, EdgeNames, EdgeQuantizer
from lightning_quant.layers.packed import recurrences_whole
from lightning_quant.runtimes._flat import Flat, dynamic_shapes, example_tensors, exporting, refused
from lightning_quant.runtimes._onnx_four_bits import has_four_bits, store_in_four_bits
from lightning_quant.runtimes._onnx_layers import translations
from lightning_quant.runtimes._onnx_moves import for_onnxruntime
from lightning_quant.runtimes._spelled_out import BinsSpelledOut, SpelledOut

_ENGINE = "PyTorch's exporter to ONNX"


def export_onnx(
    module: nn.Module,
    call: CapturedCall,
    path: Path,
    *,
    rewrite: Callable[[Any], None] = for_onnxruntime,
) -> None:
    """Write a module as an ONNX file.

    Args:
        module: QDQ or float module in eval mode, on any device.
        call: what to export it for.
        path: file to write; weights of more than 2 GB go into a second file beside it.
        rewrite: changes the graph for the runtime that is to read it.

    Raises:
        ExportError: PyTorch's exporter refuses the module, with its reason.
    """
    examples = example_tensors(call)
    flat = Flat(module, call).eval()
    with exporting(_ENGINE, call.names) as fixed, recurrences_whole(), BinsSpelledOut(), SpelledOut():
        args, kwargs = call.bind(examples)
        names = output_names(module(*args, **kwargs), call.names)
        program = torch.onnx.export(
            flat,
            tuple(examples),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(call),
            input_names=list(call.names),
            output_names=names,
            custom_translation_table=translations(),
            optimize=False,
            opset_version=_opset(flat),
            verbose=False,
        )
        _name_edges(program.model, EdgeNames(flat).of_program(program.exported_program))  # type: ignore
        _optimize(program.model)  # type: ignore[union-attr]
        _name_clips(program.model)  # type: ignore[union-attr]
        rewrite(program.model)  # type: ignore[union-attr]
        store_in_four_bits(program.model)  # type: ignore[union-attr]
        _name(program.model, call.names, names)  # type: ignore[union-attr]
        _check_varies(program.model, call, fixed)  # type: ignore[union-attr]
    _leave_out_unread(program.model)  # type: ignore[union-attr]
    _strip(program.model)  # type: ignore[union-attr]
    _keep_names_apart(program.model)  # type: ignore[union-attr]
    program.save(path)  # type: ignore[union-attr]


def _opset(flat: Flat) -> int | None:
    """Return the first version of ONNX that knows what a module is quantized to; the exporter's own where all do."""
    wide = any(isinstance(m, EdgeQuantizer) and torch.iinfo(m.grid[-1]).bits > 8 for m in flat.modules())
    return 21 if wide or has_four_bits(flat) else None


def describe(path: Path, facts: dict[str, Any]) -> None:
    """Write facts into an ONNX file's `metadata_props`, where Netron and programs in any language find them.

    Args:
        path: the file; larger weights beside it are left alone.
        facts: name to value, written under "lightning_quant.NAME", as JSON where it is no text. "input_ranges" is
            added: the lowest and the highest value that the quantizer of an input tells apart, by the input's name.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    facts = {**facts, "input_ranges": _input_ranges(model.graph)}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    onnx.helper.set_model_props(model, {f"lightning_quant.{name}": text for name, text in texts.items()})
    path.write_bytes(model.SerializeToString(deterministic=True))


def _input_ranges(graph: Any) -> dict[str, list[float]]:
    from onnx import numpy_helper

    constants = {constant.name: constant for constant in graph.initializer}
    ranges = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in {value.name for value in graph.input}:
            scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
            clip = next((n for n in graph.node if n.op_type == "Clip" and n.input[0] == node.output[0]), None)
            info = np.iinfo(zero.dtype)
            ends = [info.min, info.max]
            if clip is not None:
                ends = [int(numpy_helper.to_array(constants[name])) for name in clip.input[1:3]]
            ranges[node.input[0]] = [(bound - int(zero)) * float(scale) for bound in ends]
    return ranges


def _check_varies(model: Any, call: CapturedCall, fixed: list[str]) -> None:
    """Make sure that sizes that may vary do so in a graph: the exporter tries again with constants of its own accord.

    Raises:
        ExportError: one is a constant.
    """
    sizes = {value.name: value.shape for value in model.graph.inputs}
    for name in call.names:
        for dimension in call.dynamic.get(name, {}) if name in sizes else ():
            if isinstance(sizes[name][dimension], int):
                where = f", at {fixed[-1]}" if fixed else ""
                raise refused(_ENGINE, f"dimension {dimension} of `{name}` is {sizes[name][dimension]} alone{where}")


def _optimize(model: Any) -> None:
    """Simplify the graph as PyTorch's exporter would, but leave small weights as they are stored.

    The exporter computes what depends on constants of up to 8,192 values, and so would write weights of small layers in
    float. Equal nodes become one, but not those that quantize: there is one for every edge of the plan, and several
    parts of a module may read the same tensor.
    """
    from onnxscript import rewriter
    from onnxscript.optimizer import optimize_ir
    from onnxscript.rewriter.onnx_fusions import fuse

    rules = tuple(_Rule(rule) for rule in rewriter._DEFAULT_REWRITE_RULES if not _takes_for_zero(rule))
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    for index, node in enumerate(quantizers):
        node.overload = str(index)
    with mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", rules):
        optimize_ir(model, should_fold=lambda node: False if _widens(node) else None)
    for node in quantizers:
        node.overload = ""
    fuse(model)
    _pool_globally(model)


def _takes_for_zero(rule: Any) -> bool:
    """Tell whether a rule drops zeros that are added or subtracted.

    It takes up to 1e-8 for zero, which keeps logarithms and quotients finite.
    """
    nodes = rule._matcher.pattern.output_nodes
    return bool(nodes) and any(getattr(value, "_value", None) == 0 for value in nodes[0].inputs)


def _pool_globally(model: Any) -> None:
    """Write means over all places of what is quantized as global pools, which have an integer kernel for any size."""
    import onnx_ir as ir

    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "ReduceMean" and len(node.inputs) > 1 else None
        producer = None if source is None else source.producer()
        if source is None or producer is None or producer.op_type != "DequantizeLinear" or source.shape is None:
            continue
        axes, rank = ir.convenience.get_const_tensor(node.inputs[1]), len(source.shape)
        if axes is None or rank < 3 or sorted(axis % rank for axis in axes.numpy().tolist()) != list(range(2, rank)):
            continue
        made = [ir.node("GlobalAveragePool", [source])]
        if not node.attributes.get_int("keepdims", 1):
            made.append(ir.node("Squeeze", [made[0].outputs[0], node.inputs[1]]))
        made[-1].outputs[0].shape, made[-1].outputs[0].dtype = node.outputs[0].shape, node.outputs[0].dtype
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, node.outputs, made[-1].outputs)


class _Rule:
    """A rule of the rewriter that is tried on nodes of its own operator alone, in a quarter of the rewriter's time."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        outputs = rule._matcher.pattern.output_nodes
        self.operator = outputs[0].op_identifier() if outputs else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def try_rewrite(self, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        """Return the nodes that take the place of a match, or None."""
        if self.operator is not None and self.operator != node.op_identifier():
            return None
        return self.rule.try_rewrite(model, graph, node, **options)


def _name(model: Any, inputs: tuple[str, ...], outputs: list[str]) -> None:
    """Name inputs and outputs again: a tensor that is both, or a result twice, has got other names on the way."""
    for values, names in ((model.graph.outputs, outputs), (model.graph.inputs, inputs)):
        if len(values) == len(names):
            for value, name in zip(values, names, strict=True):
                value.name = name


def _name_edges(model: Any, edges: dict[str, str]) -> None:
    """Name the nodes that quantize after the plan's edges, while the exporter's notes are there to tell.

    Args:
        model: the graph.
        edges: name of a node of the exported program to the edge that it quantizes.
    """
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
            if (edge := edges.get(scopes[-1])) is not None:
                node.name = f"{PREFIX}{edge}"


def _name_clips(model: Any) -> None:
    """Give the name of an edge to the clip behind its quantizer, behind which the grid is whole."""
    for node in model.graph:
        producer = node.inputs[0].producer() if node.op_type == "Clip" else None
        if producer is not None and producer.op_type == "QuantizeLinear" and (producer.name or "").startswith(PREFIX):
            node.name, producer.name = producer.name, f"{node.name} of"


def _leave_out_unread(model: Any) -> None:
    """Take away inputs that nothing reads, such as labels: who calls the file has none."""
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)


def _widens(node: Any) -> bool:
    """Tell whether a node turns stored weights into wider values."""
    stored = ("INT8", "FLOAT16", "BFLOAT16")
    return node.op_type == "Cast" and node.inputs[0].dtype is not None and node.inputs[0].dtype.name in stored


def _strip(model: Any) -> None:
    """Remove the exporter's notes, which name files of the machine and outweigh the weights of a small model."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()


def _keep_names_apart(model: Any) -> None:
    """Rename values that have the name of an output, as a result called "embedding" may."""
    outputs = {value.name: value for value in model.graph.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in outputs and outputs[value.name] is not value:
                value.name = f"{value.name}_inside"
