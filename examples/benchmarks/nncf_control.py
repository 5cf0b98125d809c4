"""NNCF's accuracy control as its documentation asks for it: what it validates is what it passes, some items or all."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Inputs = dict[str, np.ndarray]
# Samples that NNCF ranks by; its own default.
_NUM_RANKING_SAMPLES = 300


class Controlled(NamedTuple):
    """What NNCF ended with.

    Attributes:
        model: of OpenVINO.
        readings: how often all samples of validation were read for quantized models; once more for float is left out.
        files: models that were validated on all of them, float left out.
    """

    model: Any
    readings: float
    files: int


def accuracy_control(
    model: Any,
    calls: list[Inputs],
    items: list[tuple[Inputs, np.ndarray]],
    score: Callable[[np.ndarray, np.ndarray], float],
    max_drop: float,
    max_iterations: int | None = None,
    **options: Any,
) -> Controlled:
    """Let NNCF revert operators until its validation keeps a limit.

    Args:
        model: of OpenVINO, in float, whose first output are logits.
        calls: to calibrate with.
        items: batches of validation, inputs by name and labels, all of one size.
        score: of predicted classes and labels.
        max_drop: that is allowed.
        max_iterations: operators that it reverts at most; all by default.
        **options: of `quantize_with_accuracy_control`.
    """
    import nncf

    size, read, whole = len(items[0][1]), 0, 0

    def validate(compiled: Any, some: Any) -> tuple[float, list[float]]:
        nonlocal read, whole
        predicted, labels = [], []
        for inputs, expected in some:
            predicted.append(compiled(inputs)[0].argmax(1))
            labels.append(expected)
            read += len(expected)
        whole += len(labels) == len(items)
        each = [float((one == expected).mean()) for one, expected in zip(predicted, labels, strict=True)]
        return score(np.concatenate(predicted), np.concatenate(labels)), each

    bounds = {"ranking_subset_size": max(1, _NUM_RANKING_SAMPLES // size)}
    bounds |= {} if max_iterations is None else {"max_num_iterations": max_iterations}
    quantized = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(calls),
        nncf.Dataset(items, lambda item: item[0]),
        validate,
        max_drop=max_drop,
        subset_size=len(calls),
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(**bounds),
        **options,
    )
    return Controlled(quantized, read / sum(len(labels) for _, labels in items) - 1, whole - 1)
