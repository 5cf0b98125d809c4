"""Message-passing nets of chemprop: graphs in dataclasses of their own as batches, molecules as data."""

from pathlib import Path
from typing import Any

import numpy as np
from chemprop import data, models, nn
from chemprop.models import load_model, save_model
from lightning.pytorch import Trainer

_FRAGMENTS = ("C", "CC", "CCO", "c1ccccc1", "CN", "CC(=O)O", "CCCl", "c1ccncc1")
_MOLECULES = [first + second for first in ("C", "CC", "CCC", "OCC") for second in _FRAGMENTS]


def _loader(smiles: list[str], *, shuffle: bool) -> Any:
    points = [data.MoleculeDatapoint.from_smi(text, np.array([len(text) / 10.0])) for text in smiles]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=8, num_workers=0, shuffle=shuffle)


def _model(passing: Any, aggregation: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        messages = passing(d_h=16, depth=2)
        model = models.MPNN(messages, aggregation(), nn.RegressionFFN(input_dim=messages.output_dim, hidden_dim=16))
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=3, default_root_dir=folder, callbacks=callbacks, **settings)
        trainer.fit(model, _loader(_MOLECULES, shuffle=True), _loader(_MOLECULES[::2], shuffle=False))
        save_model(folder / "model.pt", model)
        load_model(folder / "model.pt")
        return True

    return fit


MODELS = {
    "BondMessages": _model(nn.BondMessagePassing, nn.MeanAggregation),
    "AtomMessages": _model(nn.AtomMessagePassing, nn.NormAggregation),
}
