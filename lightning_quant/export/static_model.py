"""The way with a graph, as the stages see it: a prepared model that can be converted, compared and exported."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lightning_quant.calibrate.calibrate import observe_unreached
from lightning_quant.errors import CalibrationError
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.simulate.parity import PARITY_SAMPLES, Parity, check_parity
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import as_exported, evaluation_mode


class StaticModel(Prepared):
    """What `prepare` returns: state and simulation are those of `Prepared`, what follows calibration is here."""

    @property
    def evaluated_layers(self) -> tuple[str, ...]:
        """Names of the layers whose weights a graph of the whole module reads."""
        operators = [operator for graph in self.plan.graphs if not graph.path for operator in graph.operators]
        return tuple(layer for operator in operators if (layer := operator.weight.rpartition(".")[0]))

    def for_trial(self) -> Self:
        """Return another binding with ranges of the captured call, or made-up ones where that call gives no numbers."""
        trial = self.bound_to(self.root)
        trial.ranges = self.ranges.anew(self.recipe, "min_max")
        args, kwargs = trial.call()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            evaluation_mode(trial.root),
            suppress(CalibrationError),
        ):
            with trial.attached("observe", observing=True):
                trial.root(*args, **kwargs)
            trial.ranges.check()
            return trial
        trial.ranges = self.ranges.anew(self.recipe, "min_max")
        for observer in trial.ranges.observers.values():
            observer.update(torch.tensor([0.0, 1.0]))
        return trial

    def observe_unreached(self) -> None:
        """Learn ranges that no batch has reached from the captured call, where validation goes ways of its own."""
        observe_unreached(self)

    def converted(self, *, static_sizes: bool) -> tuple[nn.Module, Any]:
        """Return the QDQ module, which agrees with the simulation, and its result for the captured call."""
        args, kwargs = self.call()
        converted = convert(self, static_sizes=static_sizes)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), as_exported():
            check_agreement(self, converted, args, kwargs)
            return converted, converted(*args, **kwargs)

    def parity(self, loaded: nn.Module, model_path: Path) -> Parity:
        """Compare a loaded artifact, and its operators one by one where the runtime can, with the simulation."""
        return check_parity(self, loaded, self.runtime, model_path, self.samples(PARITY_SAMPLES))
