from typing import Any

import pytest
import torch
from lightning_models import Classifier, fit, images
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.measure.contributions import Difference, Metrics, of_samples
from lightning_quant.measure.evaluate import evaluate
from lightning_quant.measure.interim import Interim, PartialMetrics, is_indifferent, only_loader, random_order


class Validated(Classifier):
    """Has as many batches as validation needs to be cut short."""

    def val_dataloader(self) -> Any:
        return DataLoader(images(80, seed=2), 2)


class Remembering(Validated):
    """Logs what depends on the batch before."""

    before = 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        now = float(batch[0].mean())
        self.log("jump", now - self.before, batch_size=2)
        self.before = now


def looked_at(decides: Any, number: int = 80, step: int = 1) -> tuple[Interim, list[int]]:
    values = torch.randn(number, generator=torch.Generator().manual_seed(0)).tolist()
    interim = Interim(Metrics({"m": 0.0}, contributions={"m": of_samples(values)}), decides, range(number))
    looks = []

    def parts(seen: int) -> Any:
        looks.append(seen)
        return {"m": of_samples(values[:seen]), "other": of_samples(values)}

    for seen in range(step, number + 1, step):
        if interim.look(seen, lambda seen=seen: parts(seen)):
            break
    return interim, looks


def test_looks_are_few_and_at_fixed_shares() -> None:
    assert looked_at(lambda _: False)[1] == [10, 20, 40]
    assert looked_at(lambda _: False, step=32)[1] == [32, 64]
    assert looked_at(lambda _: False, number=6)[1] == [5]
    interim, looks = looked_at(lambda differences: differences["m"].samples == 20)
    assert looks == [10, 20]
    assert interim.metrics is not None
    assert interim.metrics.share == 0.25
    # On the same data they are the same model's.
    assert interim.metrics["m"] == interim.metrics.floating["m"]
    assert set(interim.metrics) == {"m"}


@pytest.fixture(scope="module")
def trained() -> Any:
    model = Remembering()
    trainer = fit(model, max_epochs=1)
    return trainer, model, evaluate(trainer, model, "net", contributions=True)


def test_batches_of_an_early_end_are_those_of_the_order_alone(trained: Any) -> None:
    trainer, model, whole = trained
    names = ["val_accuracy", "val_loss"]
    order = random_order(trainer.val_dataloaders, whole, names)
    assert sorted(order) == list(range(40)) != order
    seen: list[dict[str, Difference]] = []
    part = evaluate(trainer, model, "net", interim=Interim(whole, lambda d: bool(seen.append(dict(d)) or True), order))
    assert isinstance(part, PartialMetrics)
    assert part.share == 1 / 8
    for name in names:
        assert part[name] == pytest.approx(whole.contributions[name].of(order[:5]), rel=1e-4)
        assert seen[0][name].value == pytest.approx(0.0, abs=1e-6)
    # What depends on the order is found out by the first look.
    assert is_indifferent(whole, part, order, names)
    assert not is_indifferent(whole, part, order, ["jump"])
    assert not is_indifferent(whole, part, order, ["absent"])


def test_a_validation_that_nothing_ends_is_that_of_the_datas_own_order(trained: Any) -> None:
    trainer, model, whole = trained
    order = random_order(trainer.val_dataloaders, whole, ["val_accuracy"])
    through = evaluate(trainer, model, "net", contributions=True, interim=Interim(whole, lambda _: False, order))
    assert not isinstance(through, PartialMetrics)
    assert through["val_accuracy"] == whole["val_accuracy"]
    parts = through.contributions["val_loss"]
    for place in range(parts.number):
        assert parts.of([place]) == pytest.approx(whole.contributions["val_loss"].of([place]), rel=1e-4)


def test_what_the_end_of_a_cut_validation_raises_is_no_matter(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, model, whole = trained

    def fail(_: Any) -> None:
        raise RuntimeError("not all samples")

    order = random_order(trainer.val_dataloaders, whole, ["val_accuracy"])
    monkeypatch.setattr(Remembering, "on_validation_epoch_end", fail)
    assert evaluate(trainer, model, "net", interim=Interim(whole, lambda _: True, order)).keys() >= {"val_accuracy"}
    with pytest.raises(RuntimeError, match="not all samples"):
        evaluate(trainer, model, "net", interim=Interim(whole, lambda _: False, order))


def test_batches_that_have_to_come_as_they_are_have_no_order() -> None:
    data = TensorDataset(torch.zeros(80, 1))
    floating = Metrics({"m": 0.0}, contributions={"m": of_samples([0.0] * 40)})
    assert random_order([DataLoader(data, 2)], floating, ["m"])
    assert only_loader([DataLoader(data, 2)] * 2) is None
    for loader in (DataLoader(data, 2, shuffle=True), DataLoader(list(range(80)), None), [data]):
        assert random_order(loader, floating, ["m"]) == []
    # Fewer batches than pay, metrics without parts, and steps that draw random numbers.
    assert random_order(DataLoader(data, 2), floating, ["m", "other"]) == []
    assert random_order(DataLoader(data, 8), floating, ["m"]) == []
    assert (
        random_order(DataLoader(data, 2), Metrics({"m": 0.0}, contributions={"m": of_samples([0.0] * 6)}), ["m"]) == []
    )
    assert (
        random_order(DataLoader(data, 2), Metrics(floating, draws=True, contributions=floating.contributions), ["m"])
        == []
    )
