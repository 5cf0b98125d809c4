"""Estimators of gluonts: iterators as loaders, models that are called by method as well as by forward."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch import model as gluonts_models

_DATA = ListDataset(
    [{"start": pd.Period("2020-01-01", "D"), "target": np.sin(np.arange(120) / 5 + n) + 2} for n in range(4)], freq="D"
)


def _model(path: str, **options: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        import importlib

        module, _, name = path.partition(":")
        kind = getattr(importlib.import_module(f"{gluonts_models.__name__}.{module}"), name)
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = {"max_epochs": 2, "default_root_dir": str(folder), "callbacks": callbacks, **settings}
        estimator = kind(prediction_length=4, batch_size=16, num_batches_per_epoch=6, trainer_kwargs=trainer, **options)
        predictor = estimator.train(_DATA, validation_data=_DATA)
        predictor.serialize(folder)
        return True

    return fit


MODELS = {
    "SimpleFeedForward": _model("simple_feedforward:SimpleFeedForwardEstimator", hidden_dimensions=[16]),
    "PatchTST": _model("patch_tst:PatchTSTEstimator", context_length=16, patch_len=4, d_model=8, nhead=2),
    "DLinear": _model("d_linear:DLinearEstimator", hidden_dimension=8),
    "TiDE": _model("tide:TiDEEstimator", freq="D", feat_proj_hidden_dim=4, encoder_hidden_dim=4),
    "TFT": _model("tft:TemporalFusionTransformerEstimator", freq="D", hidden_dim=8, num_heads=2),
    "DeepAR": _model("deepar:DeepAREstimator", freq="D", hidden_size=8),
    "WaveNet": _model("wavenet:WaveNetEstimator", freq="D", num_residual_channels=4, num_skip_channels=4),
}
