"""Which samples get another prediction of the artifact than of float, and which operator does it.

Found by patching: of one operator at a time neither weight nor output is rounded while everything else is. Where the
float prediction comes back, that operator tipped it.
"""

import collections
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calls.calls import Call, flatten_call
from lightning_quant.calls.signature import leaves_of
from lightning_quant.calls.structures import reachable_tensors
from lightning_quant.errors import NoEffectWarning, QuantizationError
from lightning_quant.measure.rounded_parts import all_but, name_of, own_parts
from lightning_quant.measure.thumbnails import image_of, text_of
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.host import HOST, moved
from lightning_quant.surgery.routing import evaluation_mode, without_fast_path

# Samples that are kept, operators that are patched, and multiply-adds that this may take: some seconds.
NUM_KEPT, _NUM_PATCHED = 6, 16
_MULTIPLY_ADDS = 10**10
# The tensors of one sample of a call; None where it cannot be told from those around it.
Alone = Callable[[Call, int], list[Tensor] | None]


@dataclass(frozen=True)
class ChangedSample:
    """A sample whose prediction changed.

    Attributes:
        before: class that float predicts.
        after: class that the artifact predicts.
        margin: by how much float's score of `before` is above its score of `after`.
        reversed_margin: by how much the artifact's score of `after` is above that of `before`.
        image: PNG in base64 of an input that is an image; empty without one.
        text: what a tokenizer makes of an input that is tokens; empty without one.
        causes: operators that alone, computed in float, bring the float prediction back.
    """

    before: int
    after: int
    margin: float
    reversed_margin: float
    image: str = ""
    text: str = ""
    causes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChangedPredictions:
    """What changed its prediction.

    Attributes:
        num_samples: that were compared.
        num_changed: that changed.
        samples: some of them.
        num_tried: operators that were patched for each; 0 where none were.
        operators: operator to the number of samples that it brings back, most first.
        base: in words, which samples were compared.
    """

    num_samples: int
    num_changed: int
    samples: tuple[ChangedSample, ...]
    num_tried: int
    operators: Mapping[str, int]
    base: str


class Predictions:
    """What is noted while validation runs, in float and then over the artifact, of calls in the same order.

    Attributes:
        num_samples: that the artifact was compared on.
        num_changed: whose prediction is another one.
        kept: the tensors of some of these, each alone.
        tokenizer: has `decode`, from ids to text; None where there is none.
        shown: whether a reader may see these, as images and texts.
    """

    def __init__(self, alone: Alone, tokenizer: Any = None, *, shown: bool = True) -> None:
        self.tokenizer, self.shown = tokenizer, shown
        self.num_samples = self.num_changed = 0
        self.kept: list[list[Tensor]] = []
        self._alone = alone
        # What float was given and predicts, call by call; None where a call has no class scores.
        self._given, self._classes = list[list[float]](), list[Tensor | None]()
        self._number = 0

    @property
    def vary(self) -> bool:
        """Whether float predicts more than one class: what is largest in other outputs is no prediction."""
        known = [classes for classes in self._classes if classes is not None]
        return bool(known) and len(torch.cat(known).unique()) > 1

    @contextmanager
    def of_float(self, module: nn.Module) -> Iterator[None]:
        """Note what the float module predicts while a block runs."""
        with _hooked(module, self.note_float):
            yield

    @contextmanager
    def of_artifact(self, module: nn.Module) -> Iterator[None]:
        """Note what is predicted in its place."""
        with _hooked(module, self.note_artifact):
            yield

    def take_float(self, other: "Predictions | None") -> None:
        """Take over what another has noted of the float module."""
        if other is not None:
            self._given, self._classes = other._given, other._classes

    def note_float(self, call: Call, output: Any) -> None:
        """Note a call of the float module."""
        scores = class_scores(output)
        self._given.append(_sums(call))
        self._classes.append(None if scores is None else scores.argmax(1).cpu())

    def note_artifact(self, call: Call, output: Any) -> None:
        """Compare a call of the artifact with that of the float module in its place, if that was given the same."""
        number, scores = self._number, class_scores(output)
        self._number += 1
        before = self._classes[number] if number < len(self._classes) else None
        if scores is None or before is None or len(before) != len(scores) or self._given[number] != _sums(call):
            return
        places = (scores.argmax(1).cpu() != before).nonzero().flatten().tolist()
        self.num_samples += len(before)
        self.num_changed += len(places)
        for place in places[: NUM_KEPT - len(self.kept)]:
            one = self._alone(call, place)
            if one is not None:
                self.kept.append(one)


def _sums(call: Call) -> list[float]:
    """Return what tells calls apart."""
    tensors = (tensor.abs() if tensor.is_complex() else tensor for tensor in reachable_tensors(tuple(call)))
    return [float(tensor.double().sum()) for tensor in tensors]


@contextmanager
def _hooked(module: nn.Module, note: Callable[[Call, Any], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            note(Call(args, kwargs), output)
        # Inputs and outputs are the user's own, of any kind: what is noted for a figure costs no run.
        except Exception as error:
            handle.remove()
            text = f"Predictions are not compared any further: {error!r}. Please report this."
            warnings.warn(text, NoEffectWarning, stacklevel=2)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def class_scores(output: Any) -> Tensor | None:
    """Return the first output that is `(batch, classes)` of at least two; None without one."""
    leaves = (leaf for leaf in leaves_of(output) if leaf.is_floating_point())
    return next((leaf.detach() for leaf in leaves if leaf.dim() == 2 and leaf.shape[1] > 1), None)


def alone(model: PlannedModel, call: Call, place: int) -> list[Tensor] | None:
    """Return the tensors of one sample of a call, on the CPU; None where it cannot be told from those around it."""
    batch = model.batch
    if batch is None or not batch.independent or batch.smallest > 1:
        return None
    try:
        spec, tensors = flatten_call(model.signature, *call)
    except QuantizationError:
        return None
    if spec.names != model.spec.names:
        return None
    return [moved(tensor, HOST).clone() for tensor in batch.cut(spec.names, tensors, place, 1)]


@torch.no_grad()
def changed_predictions(
    model: PlannedModel,
    artifact: Callable[..., Any],
    predictions: Predictions,
    base: str,
    *,
    worst: tuple[str, ...] = (),
) -> ChangedPredictions | None:
    """Look at the samples whose prediction changed, each on its own, and for the operator that did it.

    Args:
        model: detached, on the CPU.
        artifact: called like the module, with any number of samples.
        predictions: of float and artifact.
        base: in words, which samples these are.
        worst: names of operators, those to be suspected first.

    Returns:
        None where no call has class scores, or all have the same largest one.
    """
    if not predictions.num_samples or not predictions.vary:
        return None
    compared = [(one, _changed(model, artifact, one)) for one in predictions.kept]
    known = [(one, changed) for one, changed in compared if changed is not None]
    tried: tuple[str, ...] = ()
    causes: list[tuple[str, ...]] = [() for _ in known]
    if known and isinstance(model, Prepared):
        tried = _tried(model, worst)
        causes = _causes(model, known, tried)
    samples = tuple(
        ChangedSample(*changed, image_of(seen), text_of(seen, predictions.tokenizer), names)
        for (one, changed), names in zip(known, causes, strict=True)
        for seen in [one * predictions.shown]
    )
    operators = collections.Counter(name for names in causes for name in names)
    return ChangedPredictions(
        predictions.num_samples,
        predictions.num_changed,
        samples,
        len(tried),
        dict(operators.most_common()),
        base,
    )


def _scores(run: Callable[..., Any], call: Call) -> Tensor | None:
    with torch.random.fork_rng(devices=[]), without_fast_path():
        scores = class_scores(run(*call.args, **call.kwargs))
    return None if scores is None else scores.float().cpu()


Changed = tuple[int, int, float, float]


def _changed(model: PlannedModel, artifact: Callable[..., Any], one: list[Tensor]) -> Changed | None:
    """Return both predictions and margins of a sample; None where it changes only among others."""
    call = model.call(one)
    with evaluation_mode(model.root):
        scores = _scores(model.root, call), _scores(artifact, call)
    if scores[0] is None or scores[1] is None:
        return None
    floating, here = scores[0][0], scores[1][0]
    before, after = int(floating.argmax()), int(here.argmax())
    if before == after:
        return None
    return before, after, float(floating[before] - floating[after]), float(here[after] - here[before])


def _tried(model: Prepared, worst: tuple[str, ...]) -> tuple[str, ...]:
    """Return the operators that are patched: no more than the arithmetic allows."""
    macs = sum(row.macs for row in model.plan.rows) / max(1, model.num_samples)
    return worst[: min(_NUM_PATCHED, int(_MULTIPLY_ADDS / max(1.0, macs * NUM_KEPT)))]


def _causes(
    model: Prepared, known: list[tuple[list[Tensor], Changed]], tried: tuple[str, ...]
) -> list[tuple[str, ...]]:
    """Return of each sample the operators that bring its prediction back; samples of one size run together."""
    causes: list[tuple[str, ...]] = [() for _ in known]
    batch = model.batch
    if batch is None:
        return causes
    sizes: dict[Any, list[int]] = {}
    for index, (one, _) in enumerate(known):
        sizes.setdefault(tuple(tensor.shape for tensor in one), []).append(index)
    for indices in sizes.values():
        together = [
            torch.cat(values, batch.inputs[name]) if name in batch.inputs else values[0]
            for name, values in zip(model.spec.names, zip(*(known[i][0] for i in indices), strict=True), strict=True)
        ]
        before = torch.tensor([known[i][1][0] for i in indices])
        everything = all_but(model)
        lost = ~_predicts(model, together, everything, before)
        for name in tried if bool(lost.any()) else ():
            # Where rounding ties alone tipped a sample, nothing brings back what the simulation never lost.
            back_again = lost & _predicts(model, together, everything - _parts(model, name), before)
            for i, back in zip(indices, back_again, strict=True):
                causes[i] += (name,) * bool(back)
    return causes


def _parts(model: Prepared, name: str) -> frozenset[str]:
    """Return what is rounded for the sake of an operator: its weight, its output and what float ones hand it."""
    own = (own_parts(model, identity) for identity in model.operators if name_of(model, identity) == name)
    return frozenset().union(*(weight | edges for weight, edges in own))


def _predicts(model: Prepared, tensors: list[Tensor], rounded: frozenset[str], classes: Tensor) -> Tensor:
    """Tell for each sample whether it gets its class with these weights and tensors rounded and nothing else."""
    with evaluation_mode(model.root), model.simulation.quantizing_only(rounded), model.attached("frozen"):
        scores = _scores(model.root, model.call(tensors))
    return torch.zeros_like(classes, dtype=torch.bool) if scores is None else scores.argmax(1) == classes
