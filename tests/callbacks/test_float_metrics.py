from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from torch import nn

from lightning_quant.calibrate.distributed import Group
from lightning_quant.callbacks import float_metrics as file
from lightning_quant.callbacks.deployment import Deployment
from lightning_quant.callbacks.float_metrics import float_metrics
from lightning_quant.callbacks.shared import Alone, Shared
from lightning_quant.measure.contributions import Metrics


def callback(shared: Any, *, evaluate: bool = True) -> Any:
    settings = SimpleNamespace(evaluate=evaluate, limit_eval_batches=None)
    return SimpleNamespace(settings=settings, group=Group(), path="net", shared=shared, missing=[])


@pytest.mark.parametrize(("shared", "number"), [(Shared(), 1), (Alone(), 2)])
def test_float_is_validated_once_for_all_that_share_it(
    shared: Any, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(file, "evaluate", lambda *_, **how: asked.append(how) or Metrics({"acc": 0.5}))
    model: Any = SimpleNamespace(root=nn.Module())
    deployment = Deployment(LightningModule(), model, None, ())
    first, second = (float_metrics(callback(shared), None, deployment) for _ in range(2))  # type: ignore[arg-type]
    assert first.floating == second.floating == {"acc": 0.5}
    assert len(asked) == number
    assert asked[0]["contributions"]
    # Files are each member's own.
    assert first.files is not second.files
    assert float_metrics(callback(shared, evaluate=False), None, deployment).floating == {}  # type: ignore[arg-type]
