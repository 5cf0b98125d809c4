"""The float module teaches the rounded one: gradients towards its outputs join those of the user's loss.

Nothing of it is in `training_step`, optimizers or checkpoints: the teacher is the float forward of the present weights
in eval mode, which shares all tensors with the module, and the loss enters as a gradient of the module's outputs.

Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2 (temperature
and its square); Polino et al. 2018, arXiv:1802.05668, section 3 (a float teacher for a quantized student).
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_quant.arguments.arguments import check_number, from_fields, patterns
from lightning_quant.arguments.keywords import known_arguments
from lightning_quant.calls.calls import map_tensors
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.errors import NoEffectWarning, QuantizationError
from lightning_quant.surgery.routing import clone, evaluation_mode


@known_arguments
@dataclass(frozen=True)
class Distill:
    """What the float module teaches.

    Attributes:
        weight: of its loss beside the user's own.
        temperature: that class probabilities are softened with, for outputs that are logits: the loss is then the
            divergence of these over the last dimension, or of the sigmoid of each where samples have one logit. By
            default it is the mean squared difference in units of the teacher's variance, for outputs of any kind but
            single numbers, which are losses.
        layers: fnmatch patterns on names inside the module of layers whose results are taught as well, by that
            difference; together they have as much weight as the outputs.
    """

    weight: float = 0.5
    temperature: float | None = None
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", patterns("distill.layers", self.layers))
        check_number("distill.weight", self.weight)
        if self.temperature is not None:
            check_number("distill.temperature", self.temperature, 1e-3)


def read_distill(given: Any) -> Distill | None:
    """Return what `distill=` means: a weight, the fields of a `Distill`, or nothing.

    Raises:
        QuantizationError: it is something else.
    """
    if given is None or isinstance(given, Distill):
        return given
    if isinstance(given, dict):
        return from_fields(Distill, "distill", given)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise QuantizationError(
            f"Expected `distill` to be a weight such as 0.5, or a dict as {{'weight': 0.5, 'temperature': 2.0}}, but "
            f"got {given!r:.60}."
        )
    return Distill(given)


class Teacher:
    """Teaches a module what its float forward answers, call by call.

    Args:
        distill: how much, and by which loss.
        factor: by what the user's loss is multiplied before its gradients are taken.
    """

    def __init__(self, distill: Distill, factor: Callable[[], float]) -> None:
        self._distill, self._factor = distill, factor
        self._module: nn.Module | None = None
        self._of: nn.Module | None = None
        # What the float forward of a call has answered, and its layers by name, one result for each time they ran.
        self._targets: list[Tensor] = []
        self._inner: dict[str, list[Tensor]] = {}
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None, "_of": None, "_targets": [], "_inner": {}}

    def layers_of(self, names: Iterable[str]) -> list[str]:
        """Return which of some layers are taught.

        Raises:
            QuantizationError: a pattern matches none of them.
        """
        known, layers = list(names), self._distill.layers
        unused = [pattern for pattern in layers if not any(fnmatchcase(name, pattern) for name in known)]
        if unused:
            raise QuantizationError(
                f"Expected `distill.layers` to match layers that are rounded, but {unused[0]!r} matches none of "
                f"{', '.join(known[:8])}."
            )
        return [name for name in known if any(fnmatchcase(name, pattern) for pattern in layers)]

    def begin(self, student: nn.Module, layers: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Answer a call in float, before the rounded module does.

        Args:
            student: the module.
            layers: names of those inside it that are taught.
            args: of the call.
            kwargs: of the call.
        """
        self._targets, self._inner = [], {}
        teacher = self._float(student)
        with torch.no_grad(), isolated_rng(), evaluation_mode(teacher), ExitStack() as stack:
            for name in layers:
                seen = self._inner.setdefault(name, [])
                note = functools.partial(_note, seen)
                stack.callback(teacher.get_submodule(name).register_forward_hook(note).remove)
            map_tensors(self._targets.append, teacher(*args, **kwargs))

    def pulled(self, name: str, result: Tensor) -> Tensor:
        """Return what a layer has computed, with a gradient towards what it computes in float."""
        seen = self._inner.get(name)
        if not seen or seen[0].shape != result.shape:
            return result
        if not result.requires_grad:
            return result
        pull = self._pull(result, seen.pop(0), None, self._distill.weight / len(self._inner))
        return cast(Tensor, _Pulled.apply(pull, result)[0])

    def teach(self, result: Any) -> Any:
        """Return what the rounded module has answered to a call, with gradients towards what it would in float."""
        targets, self._targets, self._inner = self._targets, [], {}
        answers: list[Tensor] = []
        map_tensors(answers.append, result)
        if [answer.shape for answer in answers] != [target.shape for target in targets]:
            # In evaluation it answers otherwise, with fewer heads say: there is nothing to compare.
            if not self._has_warned:
                self._has_warned = True
                own, other = ([tuple(tensor.shape) for tensor in tensors] for tensors in (answers, targets))
                warnings.warn(
                    f"`distill` has no effect on outputs of a {type(self._of).__name__}, which have shapes {own} in "
                    f"training and {other} in evaluation, as the teacher runs; `layers` of it are taught inside.",
                    NoEffectWarning,
                    stacklevel=3,
                )
            return result
        temperature, weight = self._distill.temperature, self._distill.weight
        pulls = [self._pull(*pair, temperature, weight) for pair in zip(answers, targets, strict=True)]
        taught = [index for index, answer in enumerate(answers) if answer.requires_grad]
        # Where the module computes its loss itself, the user's gradients may come through that and no other answer.
        together = any(answers[index].dim() == 0 for index in taught)
        for group in [taught] if together else [[index] for index in taught]:
            results = _Pulled.apply(*(pulls[index] for index in group), *(answers[index] for index in group))
            for index, pulled in zip(group, results, strict=True):
                answers[index] = pulled
        left = iter(answers)
        return map_tensors(lambda _: next(left), result)

    def _pull(self, answer: Tensor, target: Tensor, temperature: float | None, weight: float) -> Tensor | None:
        """Return the gradient that an answer gets, of its shape; none for what is no prediction, such as a loss."""
        if not answer.requires_grad or answer.numel() == 0 or answer.dim() == 0:
            return None
        return slope(answer.detach().float(), target.float(), temperature) * (weight * self._factor())

    def _float(self, student: nn.Module) -> nn.Module:
        """Return a copy of a module with every forward its own, and the very parameters and buffers of the module."""
        if self._module is None or self._of is not student:
            self._module, self._of = clone(student, unrouted=True), student
            for copied, own in zip(self._module.modules(), student.modules(), strict=True):
                copied.__dict__.update(_parameters=own._parameters, _buffers=own._buffers)
        return self._module


def slope(answer: Tensor, target: Tensor, temperature: float | None = None) -> Tensor:
    """Return the gradient of the teacher's loss with respect to an answer.

    Args:
        answer: of the rounded module, float32.
        target: of the float module, of the same shape.
        temperature: of class probabilities over the last dimension, or of the sigmoid where that has no classes; None
            compares values.
    """
    if temperature is None:
        # One sample alone, or constant outputs, have no variance.
        unit = torch.maximum(target.var(correction=0), target.square().mean() / 100).clamp(min=1e-12)
        return 2 * (answer - target) / (answer.numel() * unit)
    classes = answer.shape[-1] if answer.dim() > 1 else 1
    probabilities = torch.sigmoid if classes == 1 else functools.partial(torch.softmax, dim=-1)
    apart = probabilities(answer / temperature) - probabilities(target / temperature)
    return temperature * apart / (answer.numel() / classes)


def _note(seen: list[Tensor], module: nn.Module, args: Any, result: Any) -> None:
    seen.append(result.detach())


class _Pulled(torch.autograd.Function):
    """Adds pulls, or nothing for None, to the gradients of as many answers as soon as one of them has a gradient."""

    @staticmethod
    def forward(ctx: Any, *pulls_and_answers: Tensor | None) -> tuple[Tensor, ...]:
        count = len(pulls_and_answers) // 2
        ctx.save_for_backward(*pulls_and_answers[:count])
        # Copies, since views that a function returns cannot be changed in place.
        return tuple(answer.clone() for answer in pulls_and_answers[count:] if answer is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pulls = ctx.saved_tensors
        pulled = [grad if pull is None else grad + pull.to(grad) for grad, pull in zip(grads, pulls, strict=True)]
        return *(None for _ in pulls), *pulled
