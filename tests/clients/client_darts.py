"""Time series models of darts: slotted dataclasses as batches, pytorch_lightning's DataModules, callbacks pickled."""

from pathlib import Path
from typing import Any

import numpy as np
from darts import TimeSeries
from darts import models as darts_models

_GENERATOR = np.random.default_rng(0)
_VALUES = np.sin(np.arange(200) / 5)[:, None] + 0.1 * _GENERATOR.normal(size=(200, 1))
_SERIES = TimeSeries.from_values(_VALUES.astype(np.float32))
_CHUNKS = {"input_chunk_length": 12, "output_chunk_length": 4}


def _model(name: str, **options: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = {"callbacks": callbacks, **settings}
        kind = getattr(darts_models, name)
        model = kind(n_epochs=3, batch_size=16, random_state=0, pl_trainer_kwargs=trainer, **options)
        model.fit(_SERIES[:150], val_series=_SERIES[130:], verbose=False)
        model.save(str(folder / "saved.pt"))
        kind.load(str(folder / "saved.pt"), trusted=True)
        return True

    return fit


MODELS = {
    "NBEATS": _model("NBEATSModel", num_stacks=2, num_blocks=1, num_layers=2, layer_widths=8, **_CHUNKS),
    "NHiTS": _model("NHiTSModel", num_stacks=2, num_blocks=1, num_layers=1, layer_widths=8, **_CHUNKS),
    "TCN": _model("TCNModel", num_filters=4, **_CHUNKS),
    "TiDE": _model("TiDEModel", hidden_size=8, **_CHUNKS),
    "TSMixer": _model("TSMixerModel", hidden_size=8, ff_size=8, **_CHUNKS),
    "DLinear": _model("DLinearModel", **_CHUNKS),
    "NLinear": _model("NLinearModel", **_CHUNKS),
    "BlockRNN": _model("BlockRNNModel", model="GRU", hidden_dim=8, **_CHUNKS),
    "RNN": _model("RNNModel", input_chunk_length=12, training_length=16, model="LSTM", hidden_dim=8),
    "Transformer": _model(
        "TransformerModel",
        d_model=8,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=16,
        **_CHUNKS,
    ),
    "TFT": _model("TFTModel", hidden_size=8, add_relative_index=True, **_CHUNKS),
}
