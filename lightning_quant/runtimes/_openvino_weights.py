"""Stored weights in the form that OpenVINO keeps compressed in memory: constant, convert, multiply, matrix product."""

from typing import Any

import numpy as np

_RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence")


def compress_weights(model: Any) -> Any:
    """Scale integer weights before their products instead of after them; the model is changed and returned.

    What the exporter to ONNX writes, the product first, computes the same, but OpenVINO then makes float weights of the
    integers when it compiles.

    Source: the pattern of `nncf.compress_weights`, NNCF 3.4, and the CPU plugin of OpenVINO 2026.4, with the types of
    constants read from compiled models.
    """
    constant = _constant_names(model)
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        if product.get_friendly_name() in constant:
            _let_weights_fold(product.input_values())
            continue
        weight = product.input_value(1).get_node()
        if (stored := _with_a_scale_for_each_input(product, weight)) is not None:
            _scale_input(product, *stored)
            continue
        readers = list(product.output(0).get_target_inputs())
        scaled = readers[0].get_node() if len(readers) == 1 else None
        if not _is_integer_constant(weight) or scaled is None or scaled.get_type_name() != "Multiply":
            continue
        scale = next((s.get_node() for s in scaled.input_values() if s.get_node().get_type_name() == "Constant"), None)
        rows = weight.get_output_shape(0)
        is_transposed = product.get_attributes()["transpose_b"]
        if scale is None or is_transposed or len(rows) != 2 or list(scale.get_output_shape(0)) != [rows[1]]:
            continue
        _scale_weight(product, weight, scaled, scale)
    for layer in model.get_ordered_ops():
        if layer.get_type_name() in _RECURRENT:
            _let_weights_fold(layer.input_values()[2:])
    model.validate_nodes_and_infer_types()
    return model


def _constant_names(model: Any) -> set[str]:
    """Return the names of the nodes that depend on constants alone."""
    names = set[str]()
    for node in model.get_ordered_ops():
        sources = [value.get_node().get_friendly_name() for value in node.input_values()]
        if node.get_type_name() == "Constant" or (sources and names.issuperset(sources)):
            names.add(node.get_friendly_name())
    return names


def _let_weights_fold(values: Any) -> None:
    """Clamp scaled integers that values are made of at what no weight reaches.

    Weights of recurrent layers have to be constants, and so have products of weights with each other. OpenVINO makes
    one of whatever depends on constants, but of integers that are converted and multiplied and nothing else, and then
    refuses the layer; a clamp between is enough. They stay integers in the file alone.

    Args:
        values: outputs of nodes, what the layer reads.
    """
    from openvino import opset13

    waiting, seen = [value.get_node() for value in values], set()
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() in seen:
            continue
        seen.add(node.get_friendly_name())
        if node.get_type_name() == "Multiply" and _is_integer_constant(node.input_value(0).get_node()):
            readers = list(node.output(0).get_target_inputs())
            limit = float(np.finfo(np.float32).max)
            clamped = opset13.clamp(node.output(0), -limit, limit)
            for reader in readers:
                reader.replace_source_output(clamped.output(0))
        else:
            waiting += [value.get_node() for value in node.input_values()]


def _scale_weight(product: Any, weight: Any, scaled: Any, scale: Any) -> None:
    """Put `(in, out)` integers, transposed to OpenVINO's order, times `(out, 1)` scales into a product."""
    from openvino import opset13

    integers = opset13.constant(weight.input_value(0).get_node().data.T.copy())
    steps = opset13.constant(scale.data.reshape(-1, 1).copy())
    stored = opset13.multiply(opset13.convert(integers, "f32"), steps)
    compressed = opset13.matmul(product.input_value(0), stored, False, True)
    compressed.set_friendly_name(product.get_friendly_name())
    for reader in list(scaled.output(0).get_target_inputs()):
        reader.replace_source_output(compressed.output(0))


def _with_a_scale_for_each_input(product: Any, weight: Any) -> tuple[Any, Any] | None:
    """Return `(in, out)` integers and `(in, 1)` scales of a parameter that is multiplied from the right."""
    if weight.get_type_name() != "Multiply" or any(product.get_attributes()[f"transpose_{side}"] for side in "ab"):
        return None
    integers, scale = (value.get_node() for value in weight.input_values())
    if not _is_integer_constant(integers) or scale.get_type_name() != "Constant":
        return None
    # Not before: what depends on inputs may have no shape.
    rows = weight.get_output_shape(0)
    if len(rows) != 2:
        return None
    return (integers, scale) if list(scale.get_output_shape(0)) == [rows[0], 1] else None


def _scale_input(product: Any, integers: Any, scale: Any) -> None:
    """Scale what is multiplied instead: of up to four rows OpenVINO 2026.4 makes 13 dB where inputs have scales."""
    from openvino import opset13

    scaled = opset13.multiply(product.input_value(0), opset13.constant(scale.data.reshape(-1).copy()))
    transposed = opset13.constant(integers.input_value(0).get_node().data.T.copy())
    ones = opset13.constant(np.ones((transposed.get_output_shape(0)[0], 1), np.float32))
    stored = opset13.multiply(opset13.convert(transposed, "f32"), ones)
    compressed = opset13.matmul(scaled, stored, False, True)
    compressed.set_friendly_name(product.get_friendly_name())
    for reader in list(product.output(0).get_target_inputs()):
        reader.replace_source_output(compressed.output(0))


def _is_integer_constant(node: Any) -> bool:
    if node.get_type_name() != "Convert":
        return False
    source = node.input_value(0).get_node()
    return source.get_type_name() == "Constant" and source.get_output_element_type(0).get_type_name() == "i8"
