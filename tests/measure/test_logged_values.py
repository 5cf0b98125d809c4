from typing import Any

import pytest
import torch
from lightning_models import Classifier, fit

from lightning_quant.measure.evaluate import evaluate
from lightning_quant.measure.logged_values import LoggedValues
from lightning_quant.measure.recorder import Recorder


class Drawing(Classifier):
    """Draws a random number in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("noise", torch.rand(()), batch_size=len(batch[0]))


@pytest.mark.parametrize(("model", "draws"), [(Classifier(), False), (Drawing(), True)])
def test_values_directions_and_draws_are_read_from_lightnings_records(model: Classifier, draws: bool) -> None:
    trainer = fit(model, max_epochs=1)
    values = LoggedValues(Recorder())
    trainer.callbacks.append(values)  # type: ignore[attr-defined]
    results = trainer.validate(model, verbose=False)
    assert values.draws == draws
    assert values.higher_is_better == {"val_accuracy": True}
    assert {n: share.value for n, share in values.values.items()} == pytest.approx(results[0])
    assert set(values.contributions(results[0])) == set(results[0])
    assert LoggedValues().contributions(results[0]) == {}
    assert evaluate(trainer, model, "net").draws == draws


@pytest.mark.parametrize("method", ["note", "contributions"])
def test_what_cannot_be_read_of_batches_costs_no_validation(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("cannot copy a lock")

    monkeypatch.setattr(Recorder, method, fail)
    model = Classifier()
    values = evaluate(fit(model, max_epochs=1), model, "net")
    assert "val_accuracy" in values
    assert values.contributions == {}
