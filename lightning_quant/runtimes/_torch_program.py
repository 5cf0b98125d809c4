"""A program of steps, made ready to run: a loop over operators of the closed list, without generated code."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import ArtifactError, QuantizationError
from lightning_quant.runtimes._reasons import first_line
from lightning_quant.runtimes._torch_operators import operator_of

# What PyTorch and Python raise when an operator is given what it does not take.
DAMAGE = (
    RuntimeError, AssertionError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip
CONSTANTS = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout)
}
"""What a program may name of torch."""
# What is computed once where it depends on no input: packed weights, and what they are made of. Each is about as large
# as the tensors of the file that it is made of, so that a small file cannot fill the memory when it is opened.
_ONCE = frozenset({
    "aten._make_per_channel_quantized_tensor.default", "aten.dequantize.self", "aten.mul.Tensor", "aten.zeros.default",
    "quantized.conv1d_prepack.default", "quantized.conv2d_prepack.default", "quantized.linear_prepack.default",
})  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where a step finds a value at run time."""

    index: int


@dataclass
class _Step:
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    place: int
    edge: int | str | None
    # Places of values that no later step reads.
    done: tuple[int, ...] = ()


class Program:
    """Steps that are ready to run, for the engine that was set when they were made.

    Attributes:
        num_inputs: how many tensors a call takes.
    """

    def __init__(self, program: dict[str, Any], tensors: dict[str, Tensor], path: Path, *, once: bool) -> None:
        """Resolve every name of a program.

        Args:
            program: as `read_steps` gives it.
            tensors: of the file beside it, by the names that steps have for them.
            path: where the program comes from, for messages.
            once: compute packed weights now rather than at each call.

        Raises:
            ArtifactError: a step is none that this PyTorch can carry out.
        """
        self._values: list[Any] = []
        self._places: dict[str, int] = {}
        self._steps: list[_Step] = []
        try:
            for info in program["inputs"]:
                self._add(info["name"], None)
            self.num_inputs = len(self._values)
            for name, tensor in tensors.items():
                self._add(name, tensor)
            for step in program["steps"]:
                self._read(step, once=once)
            self._results = self._decode(program["results"])
            if not isinstance(self._results, list) or len(self._results) != len(program["outputs"]):
                raise ValueError(f"it gives {self._results!r:.80} for {len(program['outputs'])} outputs")
        except DAMAGE as error:
            raise ArtifactError(
                f"Expected {path} to be a program for PyTorch {torch.__version__}, but {first_line(error)}."
            ) from error
        self._let_go()

    def __call__(
        self, inputs: list[Tensor], *, exchange: Callable[[Any, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Return the outputs.

        Args:
            inputs: in the order of the program's.
            exchange: takes the edge of each quantized tensor and the tensor, and returns what to go on with.

        Raises:
            QuantizationError: an operator refuses what it is given.
        """
        values = [*inputs, *self._values[self.num_inputs :]]
        try:
            for step in self._steps:
                result = step.function(*_filled(step.args, values), **_filled(step.kwargs, values))
                if exchange is not None and step.edge is not None:
                    result = exchange(step.edge, result)
                values[step.place] = result
                for index in step.done:
                    values[index] = None
            results = _filled(self._results, values)
            if not all(isinstance(result, Tensor) for result in results):
                raise TypeError("the program gives something else than tensors")
        except DAMAGE as error:
            raise QuantizationError(
                "Expected inputs that the model can take, such as sequences that it has positions for, but "
                f"{first_line(error)}"
            ) from error
        return results

    def _add(self, name: Any, value: Any) -> int:
        if not isinstance(name, str) or name in self._places:
            raise ValueError(f"two values are called {name!r:.80}")
        self._places[name] = len(self._values)
        self._values.append(value)
        return self._places[name]

    def _read(self, step: dict[str, Any], *, once: bool) -> None:
        function = operator_of(step["call"])
        args, kwargs = self._decode(step["args"]), self._decode_all(step["kwargs"])
        _check_devices(function, args, kwargs)
        edge = step.get("edge")
        if not isinstance(edge, int | str | None):
            raise TypeError(f"{edge!r:.80} is no name of a tensor")
        known = self._known([args, kwargs]) if once and step["call"] in _ONCE else None
        if known is not None and _is_small(step["call"], *known):
            self._add(step["name"], function(*known[0], **known[1]))
        else:
            self._steps.append(_Step(function, args, kwargs, self._add(step["name"], None), edge))

    def _known(self, arguments: list[Any]) -> list[Any] | None:
        """Return arguments with their values, or None where one is known only in a call."""
        places = _places(arguments)
        return None if any(self._values[index] is None for index in places) else _filled(arguments, self._values)

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if isinstance(value, dict):
            ((kind, name),) = value.items()
            if kind == "value":
                return _Place(self._places[name])
            if kind == "float":
                return float(name)
            if kind != "torch":
                raise ValueError(f"{value!r:.80} is no value")
            return CONSTANTS[name]
        return value

    def _decode_all(self, named: dict[str, Any]) -> dict[str, Any]:
        return {key: self._decode(value) for key, value in named.items()}

    def _let_go(self) -> None:
        """Find after which step each value is of no more use; weights and results stay."""
        kept = {*range(self.num_inputs), *_places(self._results)}
        made = {step.place for step in self._steps}
        for step in reversed(self._steps):
            read = {index for index in _places([step.args, step.kwargs]) if index in made} | {step.place}
            step.done = tuple(sorted(read - kept))
            kept |= read


class Forced:
    """Runs a program with given integers in place of those that its operators compute.

    Attributes:
        edges: edge to its integers.
        engine: whose kernels run.
        computed: edge to the integers that its producer made of the given ones.
    """

    def __init__(self, program: Program, edges: Mapping[Any, Tensor], engine: str) -> None:
        self.program, self.edges, self.engine = program, edges, engine
        self.computed: dict[Any, Tensor] = {}

    def run(self, inputs: list[Tensor]) -> None:
        """Run the program once."""
        self.program(inputs, exchange=self.exchange)

    def exchange(self, edge: Any, result: Tensor) -> Tensor:
        """Keep what an operator computes, and go on with what is given."""
        if edge not in self.edges:
            return result
        self.computed[edge] = result.int_repr()
        return torch._make_per_tensor_quantized_tensor(self.edges[edge], result.q_scale(), result.q_zero_point())


def _filled(value: Any, values: list[Any]) -> Any:
    kind = type(value)
    if kind is _Place:
        return values[value.index]
    if kind is list:
        return [_filled(item, values) for item in value]
    return {key: _filled(item, values) for key, item in value.items()} if kind is dict else value


def _places(value: Any) -> list[int]:
    if isinstance(value, _Place):
        return [value.index]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [index for item in items for index in _places(item)]


def _check_devices(function: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Let a program name no other device than the CPU."""
    for index, name in _devices(function):
        value = args[index] if index < len(args) else kwargs.get(name)
        if value not in (None, "cpu"):
            raise ValueError(f"{value!r:.80} is no device of a program")


@functools.cache
def _devices(function: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of an operator's arguments that are devices."""
    schema = getattr(function, "_schema", None)
    arguments = () if schema is None else enumerate(schema.arguments)
    return tuple((index, argument.name) for index, argument in arguments if "Device" in str(argument.type))


def _is_small(call: str, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether a result is about as large as what it is made of."""
    if call == "aten.zeros.default":
        return math.prod(args[0]) <= 2**20
    if call == "aten.mul.Tensor":
        sizes = [value.shape for value in args if isinstance(value, Tensor)]
        return math.prod(torch.broadcast_shapes(*sizes)) <= max(math.prod(size) for size in sizes)
    return True
