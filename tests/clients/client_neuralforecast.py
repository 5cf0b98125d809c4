"""Models of neuralforecast: loaders wrapped in a DataModule of pytorch_lightning, sizes read by `len`."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast import models as neural_models

_TIME = np.arange(120)
_FRAME = pd.concat(
    pd.DataFrame({"unique_id": f"s{number}", "ds": _TIME, "y": np.sin(_TIME / 5 + number) + 2.0}) for number in range(3)
)


def _model(name: str, **options: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        kind = getattr(neural_models, name)
        settings = {"max_steps": 12, "val_check_steps": 4, "batch_size": 3, "windows_batch_size": 16, "random_seed": 1}
        trainer = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        model = kind(h=4, input_size=12, callbacks=callbacks, **settings, **trainer, **options)
        forecast = NeuralForecast(models=[model], freq=1)
        forecast.fit(_FRAME, val_size=8)
        expected = forecast.predict()
        forecast.save(str(folder / "saved"), overwrite=True)
        actual = NeuralForecast.load(str(folder / "saved")).predict()
        return bool(np.allclose(expected[name], actual[name], atol=1e-4))

    return fit


MODELS = {
    "MLP": _model("MLP", hidden_size=16),
    "NHITS": _model("NHITS", mlp_units=[[16, 16]] * 3),
    "DLinear": _model("DLinear"),
    "NBEATSx": _model("NBEATSx", mlp_units=[[16, 16]] * 3),
    "NLinear": _model("NLinear"),
    "TiDE": _model("TiDE", hidden_size=8, decoder_output_dim=4, temporal_decoder_dim=8),
    "BiTCN": _model("BiTCN", hidden_size=8),
    "GRU": _model("GRU", encoder_hidden_size=8, decoder_hidden_size=8),
    "LSTM": _model("LSTM", encoder_hidden_size=8, decoder_hidden_size=8),
    "PatchTST": _model("PatchTST", hidden_size=8, linear_hidden_size=16, n_heads=2, encoder_layers=1, patch_len=4),
    "TFT": _model("TFT", hidden_size=8),
    "TCN": _model("TCN", encoder_hidden_size=8, decoder_hidden_size=8),
    "iTransformer": _model("iTransformer", n_series=3, hidden_size=8, n_heads=2, e_layers=1, d_ff=16),
}
