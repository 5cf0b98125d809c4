"""Collective variables of mlcolvar: dicts of its own DataModule, losses on what several blocks give."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from mlcolvar import cvs
from mlcolvar.data import DictDataset, DictModule

_VALUES = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))
_DATA = {"data": _VALUES, "target": _VALUES[:, :1] * 2 + 1, "labels": (_VALUES[:, 0] > 0).float()}


def _model(name: str, keys: tuple[str, ...], **options: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        kind = getattr(cvs, name)
        model = kind(**options)
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=3, default_root_dir=folder, callbacks=callbacks, **settings)
        # In one order: losses of a batch as a whole differ with what is in it.
        data = DictDataset({key: _DATA[key] for key in keys})
        trainer.fit(model, DictModule(data, lengths=[0.8, 0.2], batch_size=16, shuffle=False))
        trainer.save_checkpoint(folder / "model.ckpt")
        again = kind.load_from_checkpoint(folder / "model.ckpt", weights_only=False)
        return bool(torch.allclose(again.eval()(_VALUES), model.eval()(_VALUES), atol=1e-5))

    return fit


MODELS = {
    "Regression": _model("RegressionCV", ("data", "target"), layers=[6, 16, 1]),
    "DeepTDA": _model(
        "DeepTDA",
        ("data", "labels"),
        n_states=2,
        n_cvs=1,
        target_centers=[-7, 7],
        target_sigmas=[0.2, 0.2],
        layers=[6, 16, 1],
    ),
    "AutoEncoder": _model("AutoEncoderCV", ("data",), encoder_layers=[6, 16, 2]),
    "VAE": _model("VariationalAutoEncoderCV", ("data",), n_cvs=2, encoder_layers=[6, 16]),
}
