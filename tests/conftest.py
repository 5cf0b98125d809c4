import pytest
import torch

# Test machines share their cores; the nets here are too small to gain from threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
