"""Recipes of layers in the callback, on modules as users write them."""

import copy
from pathlib import Path
from typing import Any

import lightning_models
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from layer_models import TokenClassifier, bert, gpt2
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import equal_tensors, fit, seeded, tensors_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, load
from lightning_quant.layers.layer import StoredLayer

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


def sentences(number: int, seed: int) -> TensorDataset:
    """Tokens of shape (number, 7) whose label is the first of them, modulo 3."""
    ids = torch.randint(1, 96, (number, 7), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(ids, ids[:, 0] % 3)


class AsDicts(Dataset):
    """What a tokenizer's collator gives: a dict with labels."""

    def __init__(self, number: int, seed: int) -> None:
        self.ids, self.labels = sentences(number, seed).tensors

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": torch.ones(7).long(), "labels": self.labels[index]}


class WrapsTransformers(LightningModule):
    """What most people write: the model of transformers, called with the batch, labels in it."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = copy.deepcopy(bert()).train() if model is None else model
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.model(**batch)
        self.accuracy(output.logits, batch["labels"])
        self.log("val_loss", output.loss)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(AsDicts(16, 1), 8)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(AsDicts(16, 2), 8)


class LSTMClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = TokenClassifier()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(sentences(16, 1), 8)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(sentences(16, 2), 8)


def metrics_of(callback: PostTrainingQuantization) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in callback.artifact.report["metrics"]}


def validate(net: Any) -> float:
    """Return the LSTM classifier's validation loss over equal batches, in plain torch."""
    with torch.no_grad():
        return sum(F.cross_entropy(net(x), y).item() for x, y in DataLoader(sentences(16, 2), 8)) / 2


# --- recurrent nets


@pytest.mark.parametrize(
    ("recipe", "runtime"),
    [
        ("int8_dynamic", "onnxruntime"),
        ("int8_dynamic", "torch"),
        ("int8_weight_only", "torch"),
        ("int4_weight_only", "torch"),
        ("bfloat16", "torch"),
    ],
)
def test_lstm_classifier(recipe: str, runtime: str, tmp_path: Path) -> None:
    module = seeded(LSTMClassifier)
    callback = PostTrainingQuantization(recipe, runtime, output_dir=tmp_path)
    fit(module, callback)
    row = metrics_of(callback)["val_loss"]

    assert row["float_value"] == pytest.approx(validate(module.net.eval()), rel=1e-5)
    assert row["artifact"] == pytest.approx(validate(load(tmp_path)), rel=1e-4)
    assert row["artifact"] != row["float_value"]
    assert row["simulated"] == pytest.approx(row["artifact"], abs=1e-2)
    assert abs(row["artifact"] - row["float_value"]) < 0.05
    if runtime == "torch":
        assert row["simulated"] == pytest.approx(row["artifact"], rel=1e-6)
    assert not any(isinstance(child, StoredLayer) for child in module.modules())
    assert {"quantize", "export", "evaluate"} - set(callback.artifact.report["seconds"]) <= {"quantize"}


@pytest.mark.parametrize("recipe", ["int8_dynamic", "float16"])
def test_training_and_checkpoints_are_those_of_float(recipe: str, tmp_path: Path) -> None:
    def run(folder: str, *callbacks: Any) -> tuple[dict[str, Tensor], Any]:
        module = seeded(LSTMClassifier)
        fit(module, *callbacks, enable_checkpointing=True, default_root_dir=tmp_path / folder)
        (path,) = (tmp_path / folder).rglob("*.ckpt")
        return tensors_of(module), torch.load(path, weights_only=True)

    with_callback = run("with", PostTrainingQuantization(recipe, "torch", output_dir=tmp_path / "artifact"))
    without = run("without")
    assert equal_tensors(with_callback[0], without[0])
    assert equal_tensors(with_callback[1]["state_dict"], without[1]["state_dict"])
    assert seeded(LSTMClassifier, seed=3).load_state_dict(with_callback[1]["state_dict"], strict=True)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(precision: str, tmp_path: Path) -> None:
    module = seeded(LSTMClassifier)
    callback = PostTrainingQuantization("int8_dynamic", "torch", output_dir=tmp_path)
    fit(module, callback, precision=precision)
    row = metrics_of(callback)["val_loss"]
    assert abs(row["artifact"] - row["float_value"]) < 0.05
    assert callback.artifact.plan["stored_share"] == 1.0


# --- modules that wrap a model of transformers


@pytest.mark.parametrize("runtime", ["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_wrapped_model_needs_no_argument_but_the_recipe(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = seeded(WrapsTransformers)
    callback = PostTrainingQuantization("int8_dynamic", runtime)
    fit(module, callback, default_root_dir=tmp_path)
    artifact, rows = callback.artifact, metrics_of(callback)

    assert callback.path == "model"
    assert artifact.plan["stored_share"] > 0.95
    hits = losses = 0
    loaded = load(artifact.path)
    names = {info.name for info in artifact.signature.inputs}
    for batch in module.val_dataloader():
        with torch.no_grad():
            output = loaded(**{name: tensor for name, tensor in batch.items() if name in names})
        hits += int((output.logits.argmax(-1) == batch["labels"]).sum())
        losses += F.cross_entropy(output.logits, batch["labels"]).item() / 2
    assert rows["val_accuracy"]["artifact"] == pytest.approx(hits / 16)
    assert rows["val_loss"]["artifact"] == pytest.approx(losses, rel=1e-3)
    assert rows["val_loss"]["simulated"] == pytest.approx(rows["val_loss"]["artifact"], abs=0.02)
    assert rows["val_loss"]["float_value"] == pytest.approx(rows["val_loss"]["artifact"], abs=0.05)


class LanguageModel(WrapsTransformers):
    """Validates by generating, too, which only the model's own class can."""

    def __init__(self) -> None:
        super().__init__(copy.deepcopy(gpt2()).train())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = batch["input_ids"]
        generated = self.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        self.log("generated", generated[:, 7:].float().mean())
        self.log("val_loss", self.model(input_ids=ids, labels=ids).loss)


def test_validation_that_generates(tmp_path: Path) -> None:
    module = seeded(LanguageModel)
    callback = PostTrainingQuantization("int8_weight_only", "torch", output_dir=tmp_path)
    fit(module, callback)
    rows = metrics_of(callback)
    assert set(rows) == {"generated", "val_loss"}
    assert rows["generated"]["artifact"] == rows["generated"]["simulated"]
    assert rows["val_loss"]["artifact"] == pytest.approx(rows["val_loss"]["float_value"], abs=0.05)
    assert rows["val_loss"]["artifact"] != rows["val_loss"]["float_value"]


# --- refusals


def test_training_through_a_recipe_of_layers_is_refused() -> None:
    for recipe in ("int8_dynamic", "float16", {"name": "int8_weight_only", "floor_db": 30}):
        with pytest.raises(MisconfigurationException, match="Use PostTrainingQuantization"):
            QuantizationAwareTraining(recipe)


def test_recipe_as_a_dict(tmp_path: Path) -> None:
    recipe = {"name": "int8_dynamic", "floor_db": 30, "min_stored_share": 0.5}
    callback = PostTrainingQuantization(recipe, "torch", output_dir=tmp_path)
    assert (callback.recipe.name, callback.recipe.floor_db, callback.recipe.schemes) == (
        "int8_dynamic",
        30,
        ("dynamic", "weight_only"),
    )
    with pytest.raises(MisconfigurationException, match=r"fields out of .*'floor_db'.* got \['floor'\]"):
        PostTrainingQuantization({"name": "int8_dynamic", "floor": 30}, "torch")


def test_nothing_to_quantize_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    recorder = lightning_models.Recorder()
    callback = PostTrainingQuantization({"name": "float16", "floor_db": 200}, "torch", output_dir=tmp_path / "a")
    with pytest.raises(MisconfigurationException, match="nothing can be quantized"):
        fit(seeded(LSTMClassifier), callback, recorder)
    assert recorder.num_batches == 0
    assert not (tmp_path / "a").exists()


class Stepwise(LightningModule):
    """Calls three modules in its step, and no forward that holds them all."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(96, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.rnn(self.embedding(batch[0]))[0][:, -1]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(sentences(16, 1), 8)

    val_dataloader = train_dataloader


@pytest.mark.usefixtures("unmeasured")
def test_recurrence_by_itself(tmp_path: Path) -> None:
    callback, module = PostTrainingQuantization("int8_dynamic", "torch", module="rnn", output_dir=tmp_path), Stepwise()
    fit(module, callback)
    (row,) = callback.artifact.report["metrics"]
    float_gru, module.rnn = module.rnn.eval(), load(tmp_path)
    by_hand = [module.training_step(batch, 0).item() for batch in module.val_dataloader()]

    assert row["artifact"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-6)
    assert row["artifact"] != row["float_value"]
    assert type(float_gru) is nn.GRU


class OwnWeights(LightningModule):
    """Holds its weights in a module of its own code, as ensembles of layers do; nothing in it is a known layer."""

    class Net(nn.Module):
        def __init__(self, columns: int) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 16, columns) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ebi,eij->bej", x.expand(3, -1, -1), self.weights)

    def __init__(self, columns: int = 64) -> None:
        super().__init__()
        self.net = self.Net(columns)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(32, 16, generator=torch.Generator().manual_seed(0))), 8)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_modules_whose_weights_are_their_own_codes_alone_are_found(runtime: Any, tmp_path: Path) -> None:
    callback = PostTrainingQuantization("int8_weight_only", runtime, output_dir=tmp_path / "artifact")
    fit(seeded(OwnWeights), callback)
    assert callback.artifact is not None
    assert callback.artifact.plan["rows"][0]["action"] == "int8 weights"


@pytest.mark.parametrize("recipe", ["int8", "int8_weight_only"])
def test_where_they_are_too_few_or_need_layers_the_refusal_names_them(recipe: str, tmp_path: Path) -> None:
    callback = PostTrainingQuantization(recipe, output_dir=tmp_path / "artifact")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="holds its weights in Net, which have no quantized form"):
        fit(seeded(OwnWeights, columns=4), callback)
