"""Estimators of deeptab: lists of features as batch, a LightningModule around an architecture."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from deeptab import configs
from deeptab import models as deeptab_models

_GENERATOR = np.random.default_rng(0)
_FRAME = pd.DataFrame(
    {
        "a": _GENERATOR.normal(size=240),
        "b": _GENERATOR.normal(size=240),
        "c": _GENERATOR.choice(["red", "green", "blue"], size=240),
    }
)
_TARGET = (_FRAME.a * 2 + (_FRAME.c == "red")).to_numpy()


def _model(name: str, **options: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        kind = getattr(deeptab_models, f"{name}Regressor")
        model = kind(model_config=getattr(configs, f"{name}Config")(**options))
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        checkpoints = {"checkpoint_path": str(folder / "checkpoints"), "default_root_dir": str(folder)}
        model.fit(_FRAME, _TARGET, max_epochs=3, batch_size=32, callbacks=callbacks, **checkpoints, **settings)
        expected = model.predict(_FRAME)
        model.save(str(folder / "model.deeptab"))
        return bool(np.allclose(kind.load(str(folder / "model.deeptab")).predict(_FRAME), expected, atol=1e-4))

    return fit


MODELS = {
    "MLP": _model("MLP", layer_sizes=[16, 8]),
    "ResNet": _model("ResNet", layer_sizes=[16], num_blocks=1),
    "FTTransformer": _model("FTTransformer", d_model=8, n_heads=2, n_layers=1),
    "TabM": _model("TabM", layer_sizes=[16, 8]),
}
