"""An artifact without a program: it is measured in a copy of the module that it was made of."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.calls.signature import Signature, described, tensor_leaves
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.surgery.process import torch_threads
from lightning_quant.surgery.routing import clone, evaluation_mode, without_fast_path


class Answers(nn.Module):
    """Calls a module with the same random numbers each time; of an answer of whatever class it returns the tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the answer to one call."""
        with torch.no_grad(), isolated_rng(0), evaluation_mode(self.module), without_fast_path():
            return described(self.module(*args, **kwargs))


class InsideModule(LoadedModule):
    """A copy of the user's module with an artifact inside; it takes whatever call the module takes.

    Args:
        module: the filled copy.
        captured: what the artifact was made of.
        signature: of the captured call.
        threads: of a call; torch's number by default.
    """

    def __init__(
        self, module: nn.Module, captured: PlannedModel, signature: Signature, threads: int | None = None
    ) -> None:
        super().__init__(signature)
        self.module, self.threads = module, threads
        self.__dict__["captured"] = captured

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the tensors of the answer to the captured call with these in place of its own."""
        args, kwargs = self.__dict__["captured"].call(tensors)
        with torch_threads(self.threads):
            return tensor_leaves(Answers(self.module)(*args, **kwargs))

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module itself returns."""
        with torch_threads(self.threads):
            return self.module(*args, **kwargs)


def load_inside(
    captured: PlannedModel, folder: Path, files: dict[str, str], signature: Signature, threads: int | None = None
) -> InsideModule:
    """Load what lies in a folder into a copy of the module that it was made of."""
    filled = captured.runtime.load(folder, files, signature, into=clone(captured.root))
    return InsideModule(filled, captured, signature, threads)
