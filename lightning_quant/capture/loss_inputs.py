"""Labels that a module takes only to return its loss: left out of what is exported, used again when it is evaluated.

transformers' models do so: `model(**batch).loss`. A deployed model has no labels, so the call without them is captured.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.capture.capture import isolated_rng
from lightning_quant.graph.analyze import own_signature
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.surgery.routing import evaluation_mode

# Agreement of the float model's own loss with a formula on its scores.
_SAME_LOSS = 1e-4


def _of_classes(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), labels.flatten())


def _of_next_tokens(scores: Tensor, labels: Tensor) -> Tensor:
    return _of_classes(scores[..., :-1, :], labels[..., 1:])


def _of_numbers(scores: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(scores.squeeze(), labels.squeeze().expand_as(scores.squeeze()))


def _of_independent_classes(scores: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, labels.float())


_FORMULAS = (_of_classes, _of_next_tokens, _of_numbers, _of_independent_classes)


class LossInputs:
    """The labels of a module's calls, and how its loss follows from scores and labels.

    Attributes:
        names: parameters of the forward that take labels.
        signature: of the forward.
        formula: gives the loss of scores and labels as the float model does; None when no known one does.
    """

    def __init__(self, names: tuple[str, ...], signature: inspect.Signature) -> None:
        self.names, self.signature = names, signature
        self.formula: Callable[[Tensor, Tensor], Tensor] | None = None

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[inspect.BoundArguments, list[Tensor]]:
        """Return a call without labels, and the labels."""
        bound = self.signature.bind(*args, **kwargs)
        labels = [bound.arguments.pop(name) for name in self.names if bound.arguments.get(name) is not None]
        return bound, labels

    def outside(self, artifact: Callable[..., Any]) -> Callable[..., Any]:
        """Return a callable that takes labels, calls an artifact without them, and adds the loss to its result.

        The loss is NaN where no formula is known, so that metrics made of it are seen to be missing.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            bound, labels = self.split(args, kwargs)
            output = artifact(*bound.args, **bound.kwargs)
            if labels:
                formula = self.formula if len(labels) == 1 else None
                unknown = torch.full((), math.nan, device=labels[0].device)
                output["loss"] = unknown if formula is None else formula(output["logits"], labels[0])
            return output

        return call


def leave_out_labels(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], LossInputs | None]:
    """Return a call without the labels in it, and what became of them; None when there are none to leave out.

    Labels are optional parameters that are named so, and without which the module returns all it returned but a loss.

    Args:
        module: the float module.
        args: of a captured call.
        kwargs: likewise.
    """
    signature = own_signature(module)
    parameters = signature.bind(*args, **kwargs).arguments
    names = tuple(
        name
        for name, value in parameters.items()
        if isinstance(value, Tensor) and "label" in name and signature.parameters[name].default is None
    )
    if not names:
        return args, kwargs, None
    loss_inputs = LossInputs(names, signature)
    bound, labels = loss_inputs.split(args, kwargs)
    with torch.no_grad(), isolated_rng(), evaluation_mode(module):
        complete = module(*args, **kwargs)
        try:
            without = module(*bound.args, **bound.kwargs)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            # They are read for more than a loss, for a decoder's input say.
            return args, kwargs, None
    if not _differ_by_a_loss(complete, without):
        return args, kwargs, None
    loss_inputs.formula = _matching(complete, labels)
    return bound.args, bound.kwargs, loss_inputs


def _differ_by_a_loss(complete: Any, without: Any) -> bool:
    if not isinstance(complete, dict) or not isinstance(without, dict) or set(complete) - set(without) != {"loss"}:
        return False
    tensors = [name for name, value in without.items() if isinstance(value, Tensor)]
    return all(signal_to_noise(complete[name], without[name]) > 100 for name in tensors)


def _matching(complete: Any, labels: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor] | None:
    if len(labels) != 1 or "logits" not in complete:
        return None
    for formula in _FORMULAS:
        try:
            loss = formula(complete["logits"], labels[0])
        except (RuntimeError, ValueError, IndexError):
            continue
        if math.isclose(loss.item(), complete["loss"].item(), rel_tol=_SAME_LOSS):
            return formula
    return None
