"""What was found for a task, and the exhaustive search that others are held against."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from search_nets import BATCH, Task
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.errors import QuantizationError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.measure.contributions import difference, of_samples
from lightning_quant.search.candidates import Candidates
from lightning_quant.search.cheapest import Part
from lightning_quant.search.choice import FLOAT, HALF, STORED, Choice
from lightning_quant.search.judge import confidence_of
from lightning_quant.search.relaxations import relaxations, rounded_in
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

# Operators that a net has at most, sets that are simulated of it as they would be exported, and sets that are looked
# at on one batch with the ranges of the whole recipe, at most.
MOST_OPERATORS, MOST_SETS, MOST_LOOKED_AT = 12, 60, 4000


@torch.no_grad()
def correct(task: Task, name: str) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Return what tells which samples a module gets right."""
    inputs, labels = task.data[name]

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        answers = torch.cat([model(batch).argmax(1) for batch in inputs.split(BATCH)])
        return {"accuracy": (answers == labels).float()}

    return evaluate


@torch.no_grad()
def correct_in_parts(task: Task) -> Callable[[nn.Module], Iterator[dict[str, Tensor]]]:
    """Return what yields which samples of validation a module gets right, batch by batch."""
    inputs, labels = task.data["validation"]

    def evaluate(model: nn.Module) -> Iterator[dict[str, Tensor]]:
        for batch, expected in zip(inputs.split(BATCH), labels.split(BATCH), strict=True):
            yield {"accuracy": (model(batch).argmax(1) == expected).float()}

    return evaluate


@dataclass
class Outcome:
    """What one way has found for a task.

    Attributes:
        validations: how often all samples of validation were read for files.
        num_bytes: of the file.
        drop: fall of accuracy on unseen samples.
        validated_drop: on the samples of validation.
        files: that were validated; as many as validations where that is not said.
    """

    validations: float
    num_bytes: int
    drop: float
    validated_drop: float
    files: int = 0


def outcome(task: Task, model: nn.Module, validations: float, num_bytes: int, files: int = 0) -> Outcome:
    """Measure what was found."""
    drops = {}
    for name in ("unseen", "validation"):
        evaluate = correct(task, name)
        drops[name] = float((evaluate(task.net)["accuracy"] - evaluate(model)["accuracy"]).mean())
    return Outcome(validations, num_bytes, drops["unseen"], drops["validation"], files)


def prepared(task: Task) -> tuple[Prepared, list[Call]]:
    """Return the whole recipe, calibrated, and the calls that it was calibrated on."""
    calls = [Call((batch,)) for batch in task.data["calibration"][0].split(64)]
    model = prepare(task.net, calls[0].args, observer="mse", trains=False)
    calibrate(model, steps_of(model, calls))
    return model, calls


@torch.no_grad()
def exhaustive(task: Task, folder: Path, look: int) -> Outcome | None:
    """Return the file of fewest bytes that keeps the limit; None for too many sets, or where none does.

    Sets are tried in the order of the bytes of their weights, and of equal ones the smaller first.

    Args:
        task: the net.
        folder: for files.
        look: whose interval decides: that of the last validation of the search.
    """
    whole, calls = prepared(task)
    makes, ranked = Candidates(whole, calls, Selection()), relaxations(whole, calls[-2:])
    if len(ranked.operators) > MOST_OPERATORS:
        return None
    exact = [HALF if name in ranked.halves else FLOAT for name in ranked.operators]
    stored = [(STORED,) if (name, STORED) in ranked.prices else () for name in ranked.operators]
    schemes = [(None, one, *other) for one, other in zip(exact, stored, strict=True)]
    sets = [
        tuple((name, scheme) for name, scheme in zip(ranked.operators, chosen, strict=True) if scheme)
        for chosen in itertools.product(*schemes)
    ]
    sets = [s for s in sets if len(s) < len(ranked.operators) or any(scheme != FLOAT for _, scheme in s)]
    sets = sorted(sets, key=lambda s: (ranked.price(dict(s)), len(s)))
    evaluate, inputs = correct(task, "validation"), task.data["validation"][0][:BATCH]
    floating, classes = evaluate(task.net)["accuracy"], task.net(inputs).argmax(1)
    number, parts = 0, rounded_in(whole)
    for kept in sets[:MOST_LOOKED_AT]:
        # Where a first batch shows that a set is far off, nothing more is made of it.
        spared = {name: FLOAT if scheme == HALF else scheme for name, scheme in kept}
        still = [one for one, users, is_weight in parts if not Part(users, is_weight, 0.0).is_spared(spared)]
        with whole.simulation.quantizing_only(frozenset[str]().union(*still)), whole.attached("frozen"):
            if float((task.net(inputs).argmax(1) != classes).float().mean()) > 10 * task.limit + 0.1:
                continue
        if (number := number + 1) > MOST_SETS:
            return None
        try:
            model = makes.make(Choice(kept))
        except QuantizationError:
            continue
        with evaluation_mode(task.net), model.attached("frozen"):
            simulated = evaluate(task.net)["accuracy"]
        if not keeps(task.limit, simulated, floating, look):
            continue
        artifact = export(model.on_host(), folder)
        if keeps(task.limit, evaluate(lq.load(folder))["accuracy"], floating, look):
            return outcome(task, lq.load(folder), number, artifact.size_bytes)
    return None


def keeps(limit: float, right: Tensor, floating: Tensor, look: int) -> bool:
    """Tell whether samples that are right keep a limit beside those that float has right, by the interval of a look."""
    if float(floating.mean() - right.mean()) > limit:
        return False
    parts = of_samples(right.tolist()), of_samples(floating.tolist())
    apart = difference(float(right.mean()), float(floating.mean()), *parts)
    return apart.worst(higher_is_better=True, confidence=confidence_of(look)) <= limit
