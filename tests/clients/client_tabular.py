"""Models of pytorch-tabular: a dict of columns as batch, categories as integers, callbacks pickled with the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_tabular import TabularModel
from pytorch_tabular import models as tabular_models
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

_GENERATOR = np.random.default_rng(0)
_FRAME = pd.DataFrame(
    {
        "a": _GENERATOR.normal(size=240),
        "b": _GENERATOR.normal(size=240),
        "c": _GENERATOR.choice(["red", "green", "blue"], size=240),
        "d": _GENERATOR.choice(["x", "y"], size=240),
    }
)
_FRAME["label"] = (_FRAME.a + _FRAME.b * (_FRAME.c == "red") > 0).astype(str)


def _model(name: str, **options: Any) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        trainer = TrainerConfig(
            batch_size=32,
            max_epochs=3,
            accelerator="cpu",
            early_stopping=None,
            checkpoints=None,
            load_best=False,
            progress_bar="none",
            trainer_kwargs={"default_root_dir": str(folder), "enable_model_summary": False},
        )
        model = TabularModel(
            data_config=DataConfig(target=["label"], continuous_cols=["a", "b"], categorical_cols=["c", "d"]),
            model_config=getattr(tabular_models, name)(task="classification", **options),
            optimizer_config=OptimizerConfig(),
            trainer_config=trainer,
            verbose=False,
        )
        model.fit(train=_FRAME[:180], validation=_FRAME[180:], callbacks=callbacks)
        expected = model.predict(_FRAME[180:]).iloc[:, -1]
        model.save_model(str(folder / "saved"))
        with torch.serialization.safe_globals([]):
            actual = TabularModel.load_model(str(folder / "saved")).predict(_FRAME[180:]).iloc[:, -1]
        return bool((expected == actual).all())

    return fit


MODELS = {
    "CategoryEmbedding": _model("CategoryEmbeddingModelConfig", layers="16-8"),
    "FTTransformer": _model("FTTransformerConfig", input_embed_dim=8, num_heads=2, num_attn_blocks=1),
    "TabTransformer": _model("TabTransformerConfig", input_embed_dim=8, num_heads=2, num_attn_blocks=1),
    "GANDALF": _model("GANDALFConfig", gflu_stages=2),
    "AutoInt": _model("AutoIntConfig", attn_embed_dim=8, num_heads=2, num_attn_blocks=1),
}
