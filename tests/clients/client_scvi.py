"""Variational models of scvi-tools: a Trainer of its own, modules whose forward calls methods by name."""

from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from scvi import model as scvi_models

_GENERATOR = np.random.default_rng(0)
_COUNTS = _GENERATOR.poisson(3.0, size=(120, 20)).astype(np.float32)


def _model(name: str, **options: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        kind = getattr(scvi_models, name)
        cells = AnnData(_COUNTS.copy())
        kind.setup_anndata(cells)
        model = kind(cells, n_latent=4, **options)
        settings = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "default_root_dir": folder}
        model.train(max_epochs=3, batch_size=32, callbacks=callbacks, check_val_every_n_epoch=1, **settings)
        expected = model.get_latent_representation()
        model.save(str(folder / "saved"))
        actual = kind.load(str(folder / "saved"), adata=cells, accelerator="cpu").get_latent_representation()
        return bool(np.allclose(expected, actual, atol=1e-4))

    return fit


MODELS = {
    "SCVI": _model("SCVI", n_hidden=16),
    "LinearSCVI": _model("LinearSCVI", n_hidden=16),
}
