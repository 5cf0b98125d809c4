"""Outputs that are no floats: classes, indices and masks, which a choice among values leaves.

On a grid of 256 values scores tie by the dozen, and engines put equal ones in orders of their own.
"""

from dataclasses import dataclass

from lightning_quant.simulate.ties import most


@dataclass(frozen=True)
class IntegerOutputs:
    """Shares of the values of such outputs that differ, in [0, 1].

    Attributes:
        quantization: of float and simulated.
        artifact: of simulated and artifact.
        ties: of the simulation and itself with its ties tipped, once for each draw; empty where it does not matter.
        alone: whether the model answers with nothing else.
    """

    quantization: float
    artifact: float
    ties: tuple[float, ...] = ()
    alone: bool = False

    @property
    def allowed(self) -> float:
        """The share that may differ: a tenth of what quantization changes, or what ties leave in 999 of 1,000 cases."""
        return max(self.quantization / 10, most(self.ties))

    @property
    def failure(self) -> str:
        """What is wrong, in plain words; empty for nothing."""
        if self.artifact <= self.allowed:
            return ""
        ties = f", {1 - max(self.ties):.2%} with rounding ties tipped" if self.ties else ""
        return (
            f"only {1 - self.artifact:.2%} of the integer outputs are those of the simulation{ties}: at least "
            f"{1 - self.allowed:.2%} are needed"
        )

    def __str__(self) -> str:
        return f"{1 - self.artifact:.2%} equal integers of simulated and artifact, {1 - self.quantization:.2%} of float"
