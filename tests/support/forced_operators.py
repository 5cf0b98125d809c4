"""Single operators of a file on given integers, in the runtimes that keep the names of edges."""

from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import numpy as np
import pytest
import torch
from prepared_graphs import evaluated
from torch import nn

from lightning_quant.errors import ExportError
from lightning_quant.export.export import export

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def check_forced(runtime: str, folder: Path) -> None:
    """Give an operator other integers than the one before it computes, and see which results change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prepared = evaluated(model, X, runtime=runtime)
    path = export(prepared, folder / "artifact").model_path
    with torch.no_grad(), prepared.attached("frozen"), prepared.simulation.recording() as recorded:
        prepared.root(X)
    edges = {identity: integers.numpy().astype(np.uint8) for identity, integers in recorded}
    right = prepared.runtime.run_forced(path, {"input": X}, edges)
    assert set(right) == set(edges)
    assert all(np.abs(right[edge].astype(int) - edges[edge].astype(int)).max() <= 1 for edge in edges)

    # Another input of the second layer changes what that computes, and neither its own nor the rest.
    other = prepared.runtime.run_forced(path, {"input": X}, {**edges, ":1": 255 - edges[":1"]})
    assert [edge for edge in edges if not np.array_equal(other[edge], right[edge])] == [":3"]
    with pytest.raises(ExportError, match="quantized tensors of the plan in the exported file"):
        prepared.runtime.run_forced(path, {"input": X}, {"elsewhere": edges[":1"]})
