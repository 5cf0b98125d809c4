"""Steps that call several independent modules: with recipes of layers one artifact holds all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import fit, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import PostTrainingQuantization, load
from lightning_quant.errors import ArtifactError
from lightning_quant.layers.layer import StoredLayer

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


def _loader(number: int) -> DataLoader:
    values = torch.randn(number, 16, generator=torch.Generator().manual_seed(number))
    return DataLoader(TensorDataset(values), 16)


def _two() -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), nn.Linear(8, 16)


class _Base(LightningModule):
    def train_dataloader(self) -> DataLoader:
        return _loader(64)

    def val_dataloader(self) -> DataLoader:
        return _loader(40)


class _Coder(_Base):
    """Calls its encoder and its decoder, never itself, beside a teacher that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _two()
        self.teacher = nn.Linear(16, 16).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return nn.functional.mse_loss(self.decoder(self.encoder(x)) * self.gain, self.teacher(x))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class _Adversarial(_Base):
    """A generator and a discriminator with an optimizer each; its own forward, which validation calls, is the first."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(16, 16)
        self.discriminator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        fake = self.generator(torch.randn_like(x))
        losses = (
            -self.discriminator(fake).mean(),
            self.discriminator(fake.detach()).mean() - self.discriminator(x).mean(),
        )
        for loss, optimizer in zip(losses, self.optimizers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", self.discriminator(self(batch[0])).mean())

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.generator, self.discriminator)]


class _Distributions(_Coder):
    """Its encoder returns a distribution, as those of variational models do."""

    class _Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> torch.distributions.Normal:
            location, scale = self.second(torch.relu(self.first(x))).chunk(2, 1)
            return torch.distributions.Normal(location, scale.exp())

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self._Encoder()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return nn.functional.mse_loss(self.decoder(self.encoder(x).rsample()), self.teacher(x))


@pytest.mark.parametrize("kind", [_Coder, _Adversarial, _Distributions])
def test_all_modules_of_a_step_are_one_artifact(kind: type[_Base], tmp_path: Path) -> None:
    callback = PostTrainingQuantization("int8_dynamic", "torch", output_dir=tmp_path / "artifact")
    model = seeded(kind)
    fit(model, callback)

    assert callback.artifact is not None
    report: Any = callback.artifact.report
    rows = {row["name"]: row for row in report["plan"]["rows"]}
    learning = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    assert {name for name, row in rows.items() if row["action"] == "int8 dynamic"} == learning
    if "teacher" in rows:
        assert "does not learn" in rows["teacher"]["reason"]
    assert "parity" not in " ".join(report["warnings"]).lower()
    assert "forward" not in vars(model)

    with pytest.raises(ArtifactError, match=r"load\(path, into=model\)"):
        load(tmp_path / "artifact")
    filled = load(tmp_path / "artifact", into=kind())
    assert all(isinstance(filled.get_submodule(name), StoredLayer) for name in learning)
    options: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    validating = Trainer(accelerator="cpu", default_root_dir=tmp_path, **options)
    torch.manual_seed(0)
    (by_hand,) = validating.validate(filled, _loader(40), verbose=False)  # type: ignore[arg-type]
    assert any("draws random numbers" in note for note in report["notes"]) == (kind is _Distributions)
    for row in report["metrics"]:
        assert row["artifact"] == row["simulated"]
        assert row["artifact"] == pytest.approx(row["float_value"], abs=0.05)
        if kind is not _Distributions:
            assert row["artifact"] == pytest.approx(by_hand[row["name"]], rel=1e-5)


@pytest.mark.parametrize(("recipe", "runtime"), [("int8", "onnxruntime"), ("int8_dynamic", "onnxruntime")])
def test_others_list_each_module_and_name_the_recipes_that_take_all(recipe: str, runtime: str, tmp_path: Path) -> None:
    callback = PostTrainingQuantization(recipe, runtime, output_dir=tmp_path / "artifact")  # type: ignore[arg-type]
    shares = r"'encoder' \(85\.\d% of their multiply-adds, 3,232 bytes\), 'decoder'"
    with pytest.raises(MisconfigurationException, match=shares + r'.*`recipe="int8_dynamic"`.*`runtime="torch"`'):
        fit(seeded(_Coder), callback)
