from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import Classifier, fit

from lightning_quant import PostTrainingQuantization
from lightning_quant.callbacks import ptq
from lightning_quant.callbacks.deployment import Deployment

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


@pytest.mark.parametrize(("weights", "note"), [("last", ""), ("best", "weights are the best ones, from ")])
def test_the_weights_to_export_are_a_copy_of_the_last_or_the_best(
    weights: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Deployment] = []
    monkeypatch.setattr(ptq, "finish", lambda callback, trainer, deployment: seen.append(deployment))
    saving = ModelCheckpoint(tmp_path / "saved", monitor="score", mode="max", save_last=True)
    model: Any = Classifier(best_epoch=0)
    fit(
        model,
        saving,
        PostTrainingQuantization(output_dir=tmp_path / "q", weights=weights),
        max_epochs=2,
        enable_checkpointing=True,
    )
    (deployment,) = seen
    assert "".join(deployment.notes).startswith(note)
    same = torch.equal(deployment.pl_module.net.conv1.weight, model.net.conv1.weight)  # type: ignore[union-attr]
    assert same == (weights == "last")
    assert deployment.pl_module is not model
    assert deployment.checkpoint == Path(saving.best_model_path)
    assert SimpleNamespace(**vars(deployment)).known is None
