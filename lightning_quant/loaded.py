"""What `load` returns for every runtime: a module that is called like the one that was quantized."""

from typing import Any

from torch import Tensor, nn

from lightning_quant.signature import Signature


class LoadedModule(nn.Module):
    """Base of the runtimes' modules; a runtime says how flat tensors are run.

    Attributes:
        signature: how it is called.
    """

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the outputs for inputs, both in the order of the signature; outputs lie where the inputs do."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "LoadedModule":
        """Note the mode, as a Trainer sets it around validation; what is loaded computes the same in both."""
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the captured structure."""
        return self.signature.unflatten(self.run(self.signature.flatten(args, kwargs)))
