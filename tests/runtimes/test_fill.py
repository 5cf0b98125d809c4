"""A model is filled from files of ours alone."""

from pathlib import Path

import pytest
import torch
from linear_nets import net
from safetensors.torch import save_file

from lightning_quant.errors import ArtifactError
from lightning_quant.runtimes._fill import STRUCTURE, fill


@pytest.mark.parametrize(
    "structure",
    [
        None,
        "",
        "[]",
        "{}",
        '{"layers": {"0": ["x"]}, "aliases": {}}',
        '{"layers": {}, "aliases": {"a": "no"}}',
        '{"layers": {}, "aliases": {"a": []}}',
        "[" * 5000,
    ],
    ids=lambda structure: str(structure)[:20],
)
def test_a_model_is_not_filled_from_what_is_no_file_of_ours(structure: str | None, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model", metadata=None if structure is None else {STRUCTURE: structure})
    with pytest.raises(ArtifactError, match="Expected"):
        fill(net(), tmp_path / "model")
    (tmp_path / "model").write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match="to hold the tensors of a model"):
        fill(net(), tmp_path / "model")
