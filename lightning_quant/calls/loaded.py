"""What `load` returns for every runtime: a module that is called like the one that was quantized."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quant.calls.signature import Signature
from lightning_quant.errors import ArtifactError, UnpicklableError


@dataclass(frozen=True)
class Origin:
    """Where a module was loaded from, so that another process can load it again.

    Attributes:
        path: the artifact's folder, absolute.
        hashes: of the model's files.
        options: that `load` was given for the runtime.
    """

    path: str
    hashes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


class LoadedModule(nn.Module):
    """Base of the runtimes' modules; a runtime says how flat tensors are run.

    Copies share what the runtime has made of the file. Pickles hold the artifact's path, from which another process
    loads the module again.

    Attributes:
        signature: how it is called.
        origin: where it was loaded from; None for one that was made otherwise.
        marker: an empty parameter, for code that asks for `next(module.parameters()).device`: it lies where the module
            was moved to, while the model stays where its runtime runs. It is in no state dict.
        shared: names of the attributes that copies share.
        unread: names of the inputs that the file does not read.
        precision: in which float layers are computed.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    unread: frozenset[str] = frozenset()
    precision: str = "f32"

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature
        self.origin: Origin | None = None
        self.marker = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where the module was moved to. Inputs may lie anywhere; outputs come back to where they lie."""
        return self.marker.device

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the outputs for inputs, both in the order of the signature; outputs lie where the inputs do.

        Several threads may call at once.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> "LoadedModule":
        """Note the mode, as a Trainer sets it around validation; what is loaded computes the same in both."""
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the captured structure."""
        outputs = self.run(self.signature.flatten(args, kwargs))
        self.signature.check_decided(outputs)
        return self.signature.unflatten(outputs)

    def __copy__(self) -> "LoadedModule":
        duplicate = type(self).__new__(type(self))
        duplicate.__dict__.update(self.__dict__)
        return duplicate

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadedModule":
        duplicate = memo[id(self)] = type(self).__new__(type(self))
        memo.update((id(self.__dict__[name]), self.__dict__[name]) for name in self.shared)
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    def __reduce__(self) -> Any:
        if self.origin is None:
            raise UnpicklableError(
                "Expected a module that `load` returned, since others cannot be loaded again by another process, but "
                f"got a {type(self).__name__} that was made otherwise."
            )
        return load_again, (self.origin,), {"training": self.training}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save nothing: the artifact's folder has all there is."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Expect nothing."""


def to_numpy(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return a tensor as a contiguous array of a type, its own memory where that serves."""
    if tensor.dtype is not dtype or tensor.requires_grad or not tensor.is_cpu:
        tensor = tensor.detach().to("cpu", dtype)
    return tensor.contiguous().numpy()


def beside(inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Return outputs that were computed on the CPU on the device of the inputs."""
    if not inputs or inputs[0].is_cpu:
        return outputs
    return [output.to(inputs[0].device) for output in outputs]


def into_how(plan: Mapping[str, Any]) -> str:
    """Return what to type to load an artifact without a program, whose plan names the module that was quantized."""
    module = plan.get("module", "")
    return f"`load(path, into={f'model.{module}' if module else 'model'})`"


def load_again(origin: Origin) -> LoadedModule:
    """Load a module as it was loaded before.

    Raises:
        ArtifactError: another artifact lies there now, or none.
    """
    from lightning_quant.artifact.artifact import load

    module = load(origin.path, **origin.options)
    if module.origin != origin:
        raise ArtifactError(
            f"Expected {origin.path} to hold the artifact that was loaded when the module was copied, but its model "
            "has changed since."
        )
    return module
