"""The call signature of an artifact: what goes in and comes out, in JSON, without need of the user's code."""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_quant.calls.call_checks import DTYPES, TensorInfo, as_captured, check_named_sizes, difference
from lightning_quant.calls.calls import CapturedCall, constant_names, context_of, flatten_call, unique_names
from lightning_quant.calls.flat_call import FlatCall, flat_call
from lightning_quant.calls.result import build, decode, freeze, indices, plain, structure_of, text
from lightning_quant.calls.structures import reachable_tensors
from lightning_quant.errors import ArtifactError, ExportError, FixedSizesError, QuantizationError

_KINDS = {kind.name: kind for kind in inspect._ParameterKind}


@dataclass(frozen=True)
class Signature:
    """How to call an artifact.

    Attributes:
        parameters: `(name, kind, default)` of every parameter of the captured forward.
        inputs: the tensors, in the order of the model file's inputs.
        constants: captured values of all other leaves, which later calls must repeat.
        outputs: the tensors that come back, in the order of the model file's outputs.
        structure: nested description of the result, with `{"tensor": i}` for the i-th output.
        context: what classes of the user's carry beside tensors, a stage say, as text; later calls must repeat it.
        optional: names of inputs that the file does not read, such as labels: a call may leave them out.
        decisions: in words, what Python read out of tensors in the captured call; the file answers NaN to a call in
            which that does not hold.
    """

    parameters: tuple[tuple[str, str, Any], ...]
    inputs: tuple[TensorInfo, ...]
    constants: tuple[Any, ...]
    outputs: tuple[TensorInfo, ...]
    structure: Any = field(default_factory=dict)
    context: str = ""
    optional: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors of a call in order.

        Raises:
            QuantizationError: the call does not fit what was captured; the message says where.
        """
        quick = None if self._flat is None else self._flat.bind(args, kwargs)
        if quick is not None:
            return quick
        tensors = self._flatten_any(args, kwargs)
        tensors = [as_captured(info, tensor) for info, tensor in zip(self.inputs, tensors, strict=True)]
        check_named_sizes(self.inputs, tensors)
        return tensors

    def arguments(self, tensors: Sequence[Tensor]) -> dict[str, Any] | None:
        """Return the captured call by keyword with these tensors in it; None where it held structures."""
        given = {info.name: tensor for info, tensor in zip(self.inputs, tensors, strict=True)}
        constants = iter(self.constants)
        named = {
            name: given.pop(name) if name in given else next(constants, None)
            for name, kind, _ in self.parameters
            if "VAR" not in kind
        }
        return None if given or next(constants, None) is not None else named

    def _flatten_any(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        spec, tensors = flatten_call(self._inspect(), args, kwargs)
        names = tuple(info.name for info in self.inputs)
        given = {
            name: plain(value)
            for name, (_, value) in zip(constant_names(spec, tensors), spec.constants, strict=True)
            if not (value is None and name in self.optional)
        }
        if spec.names != names:
            tensors = self._completed(dict(zip(spec.names, tensors, strict=True)), names)
        context = context_of(spec)
        if context and self.context and context != self.context:
            raise QuantizationError(
                f"Expected what the call carries beside tensors to be {self.context}, as captured, but got {context}: "
                "it is part of the exported model. Export again from a call with it."
            )
        captured = [plain(value) for value in self.constants]
        if list(given.values()) != captured:
            raise QuantizationError(
                f"Expected the constants of the captured call, {difference(captured, given)}: they are part of the "
                "exported model. Pass what was captured, or export again from a call with these values."
            )
        return tensors

    def _completed(self, given: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
        """Return all inputs of a call that leaves some out, which the file does not read."""
        missing = [name for name in names if name not in given]
        if set(given) - set(names) or set(missing) - set(self.optional):
            needed = tuple(name for name in names if name not in self.optional)
            raise QuantizationError(f"Expected tensors {needed} as in the captured call, but got {tuple(given)}.")
        sizes = {
            label: size
            for info in self.inputs
            if info.name in given and len(info.shape) == given[info.name].dim()
            for label, size in zip(info.shape, given[info.name].shape, strict=True)
        }
        for info in self.inputs:
            if info.name in missing:
                shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in info.shape]
                given[info.name] = torch.zeros(shape, dtype=getattr(torch, info.dtype))
        return [given[name] for name in names]

    @functools.cached_property
    def _flat(self) -> FlatCall | None:
        return flat_call(self.parameters, self.inputs, self.constants)

    def unflatten(self, tensors: list[Tensor]) -> Any:
        """Return the result that these output tensors make up."""
        return build(self.structure, tensors)

    def check_decided(self, outputs: list[Tensor]) -> None:
        """Refuse the NaN of a file that answers calls alone which decide as the captured one.

        Raises:
            FixedSizesError: the call decides otherwise.
        """
        if not self.decisions:
            return
        numbers = [output for output in outputs if output.is_floating_point() and output.numel()]
        if numbers and all(bool(output.isnan().all()) for output in numbers):
            raise FixedSizesError(
                f"Expected a call in which {' and '.join(self.decisions)}, as in the captured one, but got another: "
                "what follows from that is part of the exported model. Export again from such a call."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists that JSON can hold."""
        return {**dataclasses.asdict(self), "constants": [plain(value) for value in self.constants]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Signature":
        """Read what `to_dict` wrote.

        Raises:
            ArtifactError: a field is missing or of another type.
        """
        try:
            signature = Signature(
                parameters=tuple((text(n), text(k), d) for n, k, d in values["parameters"]),
                inputs=tuple(_info(info) for info in values["inputs"]),
                constants=tuple(freeze(value) for value in values["constants"]),
                outputs=tuple(_info(info) for info in values["outputs"]),
                structure=values["structure"],
                # Manifests of earlier versions have neither.
                context=str(values.get("context", "")),
                optional=tuple(text(name) for name in values.get("optional", ())),
                decisions=tuple(text(line) for line in values.get("decisions", ())),
            )
            signature._inspect()
            if indices(signature.structure) != list(range(len(signature.outputs))):
                raise ValueError("the result is not made of the outputs in order")
            names = [info.name for info in (*signature.inputs, *signature.outputs)]
            if len(set(names)) != len(names):
                raise ValueError("names of inputs and outputs occur twice")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ArtifactError(
                f"Expected a call signature in the manifest, but {error!r} is wrong with it."
            ) from error
        return signature

    def _inspect(self) -> inspect.Signature:
        empty = inspect.Parameter.empty
        parameters: list[inspect.Parameter] = []
        may_lack = True
        for name, kind, default in reversed(self.parameters):
            # Python wants parameters with defaults to come last.
            value = None if name in self.optional and may_lack else empty
            value = value if default == "required" else _default(default)
            may_lack = may_lack and (value is not empty or not kind.startswith("POSITIONAL"))
            parameters.insert(0, inspect.Parameter(name, _KINDS[kind], default=value))
        return inspect.Signature(parameters)


def make_signature(
    call: CapturedCall,
    output: Any,
    places: Sequence[tuple[int, int] | None] = (),
) -> Signature:
    """Describe a call and its result.

    Args:
        call: the captured call, with what of it may vary.
        output: what the captured call returned.
        places: of each output the dimension along which samples lie and the number of places for each, or None.
    """
    parameters = tuple((p.name, p.kind.name, _default_of(p)) for p in call.signature.parameters.values())
    inputs = tuple(
        _describe(name, tensor, call.dynamic.get(name, {}))
        for name, tensor in zip(call.names, call.tensors, strict=True)
    )
    leaves: list[Tensor] = []
    structure = structure_of(output, leaves)
    varying = [{} if place is None else {place[0]: _of_samples(place[1])} for place in places]
    outputs = tuple(
        _describe(name, leaf, named)
        for name, leaf, named in zip(
            output_names(output, call.names), leaves, varying or [{} for _ in leaves], strict=True
        )
    )
    constants = tuple(decode(plain(value)) for _, value in call.spec.constants)
    return Signature(parameters, inputs, constants, outputs, structure, context_of(call.spec))


def _of_samples(each: int) -> str:
    return "batch" if each == 1 else f"{each} * batch"


def tensor_leaves(output: Any) -> list[Tensor]:
    """Return the tensors of a result in the order in which they are exported."""
    leaves: list[Tensor] = []
    structure_of(output, leaves)
    return leaves


def described(output: Any) -> Any:
    """Return a result, or a list of the tensors that it holds where it is of a class that no file can describe."""
    try:
        tensor_leaves(output)
    except ExportError:
        return reachable_tensors(output)
    return output


def leaves_of(output: Any) -> list[Tensor]:
    """Return the tensors of a result of whatever class."""
    return tensor_leaves(described(output))


def output_names(output: Any, inputs: tuple[str, ...]) -> list[str]:
    """Return a name for every tensor of a result that no input has: its path in it, or "output"."""
    names: list[str] = []
    structure_of(output, [], names)
    return unique_names([*inputs, *names])[len(inputs) :]


def _describe(name: str, tensor: Tensor, dynamic: dict[int, str]) -> TensorInfo:
    shape = tuple(dynamic.get(index, int(size)) for index, size in enumerate(tensor.shape))
    return TensorInfo(name, str(tensor.dtype).removeprefix("torch."), shape)


def _info(values: dict[str, Any]) -> TensorInfo:
    info = TensorInfo(text(values["name"]), text(values["dtype"]), tuple(values["shape"]))
    if info.dtype not in DTYPES:
        raise ValueError(f"{info.dtype} is no dtype")
    for size in info.shape:
        if not (isinstance(size, str) and size) and not (type(size) is int and 0 <= size < 2**63):
            raise ValueError(f"{size!r} is no size")
    return info


def _default_of(parameter: inspect.Parameter) -> Any:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    leaves = pytree.tree_leaves(parameter.default)
    is_plain = all(x is None or isinstance(x, bool | int | float | str) for x in leaves)
    return {"value": pytree.tree_map(plain, parameter.default)} if is_plain else "required"


def _default(default: Any) -> Any:
    return freeze(default["value"])
