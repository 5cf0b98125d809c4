from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from emulated.trainer import options


class Where:
    """A device to train on: the emulated one, or a GPU.

    Attributes:
        device: where modules and batches are.
        name: its type.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = emulated.load() if name == emulated.NAME else torch.device(name, 0)

    def options(self, precision: str = "32-true") -> dict[str, Any]:
        """Return a Trainer's arguments."""
        if self.name == emulated.NAME:
            return options(precision)
        return {"accelerator": "gpu", "devices": 1, "precision": precision}


@pytest.fixture(params=[emulated.NAME, pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> Iterator[Where]:
    """Each device that a test runs on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = Where(request.param)
    # The engine starts the threads of all devices with the first backward pass of a process, which may be over.
    with torch.autograd.set_multithreading_enabled(found.name != emulated.NAME):
        yield found
