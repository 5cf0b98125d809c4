"""The errors and warnings that this package raises, each with the way out in its message."""

import pickle


class QuantizationError(ValueError):
    """Base of every error that this package raises on purpose."""


class CaptureError(QuantizationError):
    """The module to quantize, or one real call of it, could not be found."""


class UntraceableError(QuantizationError):
    """A forward does something that a graph cannot hold, such as branching on a tensor's values.

    Attributes:
        places: path of each module whose own forward does so, with what it does; empty where that is not known.
    """

    def __init__(self, message: str, places: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.places = places or {}


class PlanError(QuantizationError):
    """Nothing can be quantized as asked: no supported layer, or a pattern that matches nothing."""


class CalibrationError(QuantizationError):
    """Ranges could not be learned: no batch, non-finite values, or a tensor that was never observed."""


class ExportError(QuantizationError):
    """The converted model does not export, or disagrees with the model that was trained or calibrated."""


class ArtifactError(QuantizationError):
    """A folder is not an artifact, is damaged, or cannot be written."""


class DiskError(ArtifactError):
    """A disk does not take a file: it is full, may not be written to, or fails."""


class EvaluationError(QuantizationError):
    """The model under evaluation was not the one that ran."""


class FixedSizesError(QuantizationError):
    """A file takes the sizes of the captured call alone, and got others."""


class UnpicklableError(QuantizationError, pickle.PicklingError):
    """A loaded module cannot be loaded again elsewhere; code that tries whether something can be pickled expects it."""


class MissingRuntimeError(QuantizationError):
    """The runtime is not installed; the message carries the pip command."""


class NoEffectWarning(UserWarning):
    """Something that was asked for changed nothing, or made matters worse."""
