"""Models of pytorch-forecasting: a dict of tensors and a tuple as batch, sizes and lengths read as numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_forecasting as forecasting
from lightning.pytorch import Trainer
from pytorch_forecasting.models.mlp import DecoderMLP

_STEPS, _SERIES = 60, 4
_LENGTHS = {"encoder": 12, "prediction": 4}


def _data(**options: Any) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    time = np.tile(np.arange(_STEPS), _SERIES)
    series = np.repeat(np.arange(_SERIES), _STEPS)
    values = np.sin(time / 4 + series) + 0.1 * generator.normal(size=len(time)) + 2
    frame = pd.DataFrame({"time": time, "series": series.astype(str), "value": values.astype(np.float32)})
    settings = {"time_idx": "time", "target": "value", "group_ids": ["series"], **options}
    lengths = {f"{end}_{part}_length": size for end in ("min", "max") for part, size in _LENGTHS.items()}
    training = forecasting.TimeSeriesDataSet(frame[frame.time < 48], **settings, **lengths)
    validation = forecasting.TimeSeriesDataSet.from_dataset(training, frame, min_prediction_idx=48)
    return (
        training,
        training.to_dataloader(train=True, batch_size=16, num_workers=0),
        validation.to_dataloader(train=False, batch_size=16, num_workers=0),
    )


def _model(kind: Any, data: dict[str, Any], **options: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        training, train, validate = _data(**data)
        model = kind.from_dataset(training, learning_rate=1e-3, log_interval=-1, **options)
        trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=callbacks,
        )
        trainer.fit(model, train, validate)
        kind.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=False)
        return True

    return fit


_KNOWN = {"time_varying_unknown_reals": ["value"], "time_varying_known_reals": ["time"]}
MODELS = {
    "NBeats": _model(forecasting.NBeats, {"time_varying_unknown_reals": ["value"]}, widths=[8, 8], num_blocks=[1, 1]),
    "DecoderMLP": _model(DecoderMLP, _KNOWN, hidden_size=8),
    "NHiTS": _model(forecasting.NHiTS, _KNOWN, hidden_size=8),
    "TFT": _model(forecasting.TemporalFusionTransformer, _KNOWN, hidden_size=8, attention_head_size=2),
    "Recurrent": _model(forecasting.RecurrentNetwork, _KNOWN, hidden_size=8),
    "DeepAR": _model(forecasting.DeepAR, _KNOWN, hidden_size=8),
}
