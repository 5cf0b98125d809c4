"""What every runtime offers: one class with defaults, of which each file in `runtimes/` has one object, `RUNTIME`."""

import abc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from lightning_quant.calls.calls import CapturedCall
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.calls.signature import Signature
from lightning_quant.graph.plan import Operator
from lightning_quant.graph.table import OperatorTable


class Runtime(abc.ABC):
    """Where a quantized model runs. What is abstract here every runtime says; the rest has a default.

    Attributes:
        NAME: its file's name.
        REQUIRES: packages that it needs; the first is the engine's own.
        OPTIONS: what `load` takes.
        MODEL_FILE: name of the model's file in an artifact.
        TABLE: what it executes in integers.
        INTEGER_OPERATORS: kind of each operator that is planned in integers to the names under which `count_operators`
            may have one; no name where it is fused into others and no longer seen.
        HALF_ARITHMETIC: whether layers compute in half precision or only store their weights so; None where recipes of
            layers do not run.
        LAYER_REFUSALS: scheme to reason, for schemes of layers that do not run.
        LAYERS_IN_GRAPHS: whether a static recipe may leave layers to recipes of layers.
        IN_PROCESS: whether the float peer of comparisons is the float module itself.
        FILLS_MODULES: whether it writes artifacts of layers without a program, which modules are filled with.
        KEEPS_EDGES: whether files keep the names of quantized edges, by which single operators can be run.
        COMPILES: whether a compiler works for half a minute on each file.
        UNROLLS: whether it writes recurrent layers step by step and works on each step for about a second.
        QUICK_FLOAT: whether a float model is written soon enough to be timed beside artifacts of other runtimes, too.
    """

    NAME: ClassVar[str]
    REQUIRES: ClassVar[tuple[str, ...]]
    OPTIONS: ClassVar[tuple[str, ...]] = ("threads",)
    MODEL_FILE: ClassVar[str]
    TABLE: ClassVar[OperatorTable]
    INTEGER_OPERATORS: ClassVar[Mapping[str, tuple[str, ...]]]
    HALF_ARITHMETIC: ClassVar[bool | None] = None
    LAYER_REFUSALS: ClassVar[Mapping[str, str]] = {}
    LAYERS_IN_GRAPHS: ClassVar[bool] = False
    IN_PROCESS: ClassVar[bool] = False
    FILLS_MODULES: ClassVar[bool] = False
    KEEPS_EDGES: ClassVar[bool] = False
    COMPILES: ClassVar[bool] = False
    UNROLLS: ClassVar[bool] = False
    QUICK_FLOAT: ClassVar[bool] = False

    @abc.abstractmethod
    def export(self, module: nn.Module, call: CapturedCall, path: Path) -> None:
        """Write a QDQ or float module as a model file.

        Raises:
            ExportError: the engine or its exporter refuses the module, with the reason.
        """

    @abc.abstractmethod
    def check(self, path: Path) -> None:
        """Let the engine take a written file once.

        Raises:
            ExportError: it refuses it.
        """

    @abc.abstractmethod
    def load(self, folder: Path, files: dict[str, str], signature: Signature, **options: Any) -> LoadedModule:
        """Load an artifact's model; `files` has role to name in the folder, `options` those of `OPTIONS`.

        Raises:
            ArtifactError: the engine refuses the file, or its inputs and outputs are not those of the signature.
        """

    def load_float(self, folder: Path, files: dict[str, str], signature: Signature, threads: int) -> LoadedModule:
        """Load a float model as the engine runs it by itself, to be timed beside artifacts."""
        return self.load(folder, files, signature, threads=threads)

    @abc.abstractmethod
    def standalone(self, files: dict[str, str], signature: Signature) -> str:
        """Return lines that run an artifact's model without this package, in the artifact's folder."""

    @abc.abstractmethod
    def count_operators(self, path: Path) -> dict[str, int]:
        """Return how often each operator occurs in what the engine makes of a file."""

    def still_float(self, operators: tuple[Operator, ...], counts: dict[str, int]) -> dict[str, int]:
        """Return kind to number of planned integer operators for which what was counted has no integer one."""
        left = dict(counts)
        missing: dict[str, int] = {}
        for operator in operators:
            names = self.INTEGER_OPERATORS[operator.kind]
            name = next((name for name in names if left.get(name, 0)), None)
            if name is not None:
                left[name] -= 1
            elif names:
                missing[operator.kind] = missing.get(operator.kind, 0) + 1
        return missing

    def runs_layers(self, schemes: Iterable[str]) -> bool:
        """Tell whether layers of all these schemes run."""
        return self.HALF_ARITHMETIC is not None and self.LAYER_REFUSALS.keys().isdisjoint(schemes)

    def check_machine(self) -> None:  # noqa: B027, most runtimes need nothing
        """Make sure that this machine has what exporting needs beyond packages, and loading does not.

        Raises:
            MissingRuntimeError: it has not; the message says what is missing.
        """

    def describe(self, path: Path, facts: dict[str, Any]) -> None:  # noqa: B027, most formats have none
        """Write into a model file what a user of the file alone would ask, where its format has room for notes."""

    def export_tensors(self, module: nn.Module, path: Path) -> None:
        """Write layers and tensors of a module without a program; see `FILLS_MODULES`."""
        raise NotImplementedError

    def engines(self) -> list[str]:
        """Return the engines that files can run on here, the likeliest one first; none where there is but one."""
        return []

    def set_engine(self, path: Path, engine: str) -> None:
        """Let a written file run on one of `engines` unless `load` is given another."""
        raise NotImplementedError

    def quantized_edges(self, path: Path) -> set[str]:
        """Return the names of the plan's edges that a file has, what nothing reads left out; see `KEEPS_EDGES`."""
        raise NotImplementedError

    def run_forced(self, path: Path, inputs: dict[str, Tensor], edges: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run every operator on its own, on given inputs, in one session; see `KEEPS_EDGES`.

        Each quantized tensor of the file is cut: its readers get the given integers, and what its producer makes of
        *its* given inputs is an output. Those that there are no integers for stay as they are.

        Args:
            path: a model file.
            inputs: the model's own inputs by name.
            edges: integers of the quantized tensors by the names of their edges.

        Returns:
            the integers that the operators computed, of those edges that the file has.

        Raises:
            ExportError: the file has none of these quantized tensors, or the engine refuses an operator alone.
        """
        raise NotImplementedError

    def operator_ms(
        self, path: Path, inputs: dict[str, Tensor], operators: tuple[Operator, ...], threads: int
    ) -> dict[str, float]:
        """Return how long each operator of a call takes, in milliseconds, where the engine has a profiler.

        Args:
            path: a model file.
            inputs: the model's own inputs by name.
            operators: of the plan.
            threads: of a call.

        Returns:
            row of the plan to time; under the empty name what belongs to no row. Empty where nothing tells.
        """
        return {}

    def __reduce__(self) -> str:
        """Let copies and pickles be the one object of the runtime's file."""
        return "RUNTIME"
