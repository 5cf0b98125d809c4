"""Wrong arguments are refused where they are written, by every door, with what to write instead."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from lightning_quant.errors import QuantizationError
from lightning_quant.recipe import recipe

NET = nn.Sequential(nn.Linear(8, 4))
BOTH = (lq.QuantizationAwareTraining, lq.PostTrainingQuantization)

OF_EVERY_DOOR = [
    ({"recipe": "int8-dynamc"}, r"`recipe` to be one of .* got 'int8-dynamc'\. Did you mean 'int8_dynamic'"),
    ({"recipe": "INT8"}, r"Did you mean 'int8'"),
    ({"recipe": ["int8", "int5"]}, r"(`recipe` to be one of .*got 'int5'|one `recipe` here, but got a list)"),
    ({"recipe": None}, r"`recipe` .* got None"),
    ({"recipe": {"wieght": {"bits": 4}}}, r"`recipe` to have fields .* got \['wieght'\]\. Did you mean 'weight'"),
    ({"recipe": {"weight": {"bit": 4}}}, r"`recipe.weight` to have fields .* got \['bit'\]\. Did you mean 'bits'"),
    ({"recipe": {"name": "int8_acurate"}}, r"`recipe.name` .* Did you mean 'int8_accurate'"),
    ({"recipe": {"name": ["int8"]}}, r"`recipe.name` .* got a list"),
    ({"recipe": {"calibration_observer": "minmax"}}, r"`recipe.calibration_observer` .* Did you mean 'min_max'"),
    ({"recipe": recipe.Recipe(training_observer="mean")}, r"`recipe.training_observer` to be one of .* got 'mean'"),
    ({"recipe": {"accuracy_steps": ["equalise"]}}, r"`accuracy_steps` out of .* Did you mean 'equalize'"),
    ({"recipe": {"overrides": {"head": "flaot"}}}, r"`overrides` to map 'head' .* got 'flaot'\. Did you mean 'float'"),
    ({"recipe": {"overrides": {"head": 4}}}, r"`overrides` to map 'head' .* got 4"),
    ({"recipe": {"name": "int8_dynamic", "schemes": ["dynamik"]}}, r"`recipe.schemes` .* Did you mean 'dynamic'"),
    ({"recipe": {"accuracy_steps": "equalize"}}, r"`accuracy_steps` to be a list of names .* got 'equalize'"),
    ({"recipe": {"max_passes": "10"}}, r"`max_passes` to be 0 or more, but got '10'"),
    ({"recipe": {"weight": "int4"}}, r"`weight` to be a dict such as \{'bits': 4\} .* got 'int4'"),
    ({"recipe": {"weight": {"bits": "4"}}}, r"`bits` to be in \[2, 16\], but got '4'"),
    ({"recipe": {"overrides": ["head"]}}, r"`overrides` to be a dict such as .* got"),
    ({"recipe": {"name": "int8_dynamic", "group_size": 0}}, r"`group_size` to be a positive integer"),
    ({"recipe": "fp16"}, r"Did you mean 'float16'"),
    (
        {"recipe": [torch.zeros(2, 8)]},
        r"`recipe` .*(\(data is `calibration_data=`\), but got a Tensor|here, but got a list)",
    ),
    ({"runtime": "ort"}, r"Did you mean 'onnxruntime'"),
    ({"dynamic_shapes": {"input": {0: torch.export.Dim("n")}}}, r"dimension to its name, such as .* got"),
    ({"dynamic_shapes": {"input": {"first": "n"}}}, r"dimension to its name, such as .* got"),
    ({"limits": {"val_f1": "0.01"}}, r"`limits.val_f1` to be a number, but got '0.01'"),
    ({"limits": {"sped_up": 1.5}}, r"`limits` on metrics or .*'speedup'.* but got 'sped_up'. Did you mean 'speedup'"),
    ({"runtime": "onxruntime"}, r"`runtime` to be one of \['auto', .* got 'onxruntime'\. Did you mean 'onnxruntime'"),
    ({"runtime": "onnx"}, r"Did you mean 'onnxruntime'"),
    ({"runtime": ["openvin"]}, r"`runtime` .* got (a list|'openvin'\. Did you mean 'openvino')"),
    ({"runtime": None}, r"`runtime` .* got None"),
    ({"runtime": "torch", "engine": "qnpack"}, r"`engine` to be one of .* got 'qnpack'\. Did you mean 'qnnpack'"),
    ({"engine": "x86"}, r"no `engine` for `runtime` 'onnxruntime', but got 'x86': runtime 'torch' alone"),
    ({"threads": "2"}, r"`threads` to be a positive integer or None, but got '2'"),
    ({"threads": 0}, r"`threads` .* got 0"),
    ({"threads": True}, r"`threads` .* got True"),
    ({"output_dir": 3}, r"`output_dir` to be the path of a folder, but got 3"),
    ({"output_dir": ""}, r"`output_dir` .* got ''"),
    ({"sensitivity": "no"}, r"`sensitivity` to be True or False, but got 'no'"),
    ({"exclude": [NET[0]]}, r"`exclude` to hold patterns .*\['head', 'Linear'\], but got the layer itself"),
    ({"exclude": NET[0]}, r"`exclude` .* got the layer itself"),
    ({"exclude": 3}, r"`exclude` .* got 3"),
    ({"include": [None]}, r"`include` .* got None"),
    ({"include": ""}, r"`include` .* got ''"),
]
OF_CALLBACKS = [
    ({"module": NET}, r"`module` to be the name of a module.* got the Sequential itself: .* write `module=\"net\"`"),
    ({"module": 3}, r"`module` .* got 3"),
    ({"weights": "bset"}, r"`weights` to be one of \['last', 'best'\], but got 'bset'\. Did you mean 'best'"),
    ({"example": "train-batch"}, r"Did you mean 'train_batch'"),
    ({"evaluate": "false"}, r"`evaluate` to be True or False, but got 'false'"),
    ({"limit_eval_batches": -1}, r"`limit_eval_batches` to be a number of batches from 1, or a share .* got -1"),
    ({"limit_eval_batches": 1.5}, r"`limit_eval_batches` .* got 1\.5"),
    ({"limit_eval_batches": "all"}, r"`limit_eval_batches` .* got 'all'"),
    ({"limit_eval_batches": 0}, r"got 0\. To leave evaluation out: `evaluate=False`"),
]
OF_CALIBRATION = [
    (64, r"`calibration` to be a dict such as \{'num_batches': 64\}, but got 64"),
    ([torch.zeros(1)], r"`calibration` to be a dict .* The batches are those of the Trainer's own data"),
    ({"batches": 64}, r"`calibration` to have fields .* got \['batches'\]\. Did you mean 'num_batches'"),
    ({"num_batches": "64"}, r"`calibration.num_batches` to be a positive integer, but got '64'"),
    ({"num_batches": 0}, r"`calibration.num_batches` .* got 0"),
    ({"data": "val"}, r"`calibration.data` .* got 'val'\. Did you mean 'validation'"),
    ({"seed": "0"}, r"`calibration.seed` to be an integer, but got '0'"),
]
OF_SCHEDULE = [
    ({"fake_quant": 2}, r"`schedule` to have fields .* got \['fake_quant'\]\. Did you mean 'fake_quantize'"),
    (2, r"`schedule` to be a dict such as \{'fake_quantize': 2, .* got 2"),
    ({"fake_quantize": 2}, r"fraction below 1, or say what it counts, as unit='epochs'|in order"),
    ({"fake_quantize": 2, "unit": "epochs"}, r"fake_quantize 2, freeze_observers 0\.8, .* Say in epochs when"),
    ({"fake_quantize": "2"}, r"points of `schedule` to be numbers"),
    ({"unit": "epoch"}, r"`schedule.unit` .* got 'epoch'\. Did you mean 'epochs'"),
]


@pytest.mark.parametrize(("arguments", "message"), OF_EVERY_DOOR)
def test_quantize_refuses(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_dir": tmp_path / "q", **arguments}
    with pytest.raises(QuantizationError, match=message):
        lq.quantize(NET, calibration_data=[torch.zeros(2, 8)], **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("arguments", "message"), [*OF_EVERY_DOOR, *OF_CALLBACKS])
def test_callbacks_refuse_when_they_are_written(kind: Callable[..., Any], arguments: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        kind(**arguments)


@pytest.mark.parametrize(("calibration", "message"), OF_CALIBRATION)
def test_calibration_of_a_callback(calibration: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        lq.PostTrainingQuantization(calibration=calibration)


@pytest.mark.parametrize(("schedule", "message"), OF_SCHEDULE)
def test_schedule_of_a_callback(schedule: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        lq.QuantizationAwareTraining(schedule=schedule)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear, r"but got the class Linear\. Give an instance: `Linear\(\.\.\.\)`"),
        (NET.state_dict(), r"got a dict\. Of a state dict: build the module"),
        (torch.export.export(NET, (torch.zeros(2, 8),)), r"got ExportedProgram\. Give the module"),
        (torch.export.export(NET, (torch.zeros(2, 8),)).module(), r"got a GraphModule: give the module"),
        ([nn.Linear(8, 4), nn.ReLU()], r"got a list of modules\. .*`nn.Sequential\(\*layers\)`"),
        ({"net": NET}, r"got a dict of modules\. Give the module that calls them"),
        (
            Trainer(logger=False, accelerator="cpu"),
            r"got a Trainer\. Give the LightningModule: `trainer.lightning_module`",
        ),
        (lq.PostTrainingQuantization(), r"got PostTrainingQuantization\. .*`Trainer\(callbacks="),
        ("model.onnx", r"model.onnx is a model that was exported: give the module"),
        (None, r"`nn.Module` or the path of a Lightning checkpoint, but got None"),
        (nn.Linear(8, 4, device="meta"), r"'weight' is on the meta device.* `module.to_empty\(device='cpu'\)`"),
    ],
)
def test_what_is_no_float_module(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=message):
        lq.quantize(model, calibration_data=[torch.zeros(2, 8)], output_dir=tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_scripted_module_has_no_code_to_trace(tmp_path: Path) -> None:
    scripted = torch.jit.trace(NET, torch.zeros(2, 8))
    with pytest.raises(QuantizationError, match="got a TopLevelTracedModule: give the module that it was made from"):
        lq.quantize(scripted, calibration_data=[torch.zeros(2, 8)], output_dir=tmp_path)


@pytest.mark.parametrize("exclude", ["head", ["head"], ("head",), iter(["head"])])
def test_one_pattern_is_one_pattern(exclude: Any) -> None:
    assert lq.PostTrainingQuantization(exclude=exclude).settings.exclude == ("head",)


def test_layers_may_be_named_by_their_class() -> None:
    callback = lq.PostTrainingQuantization(include=nn.Conv2d, exclude=[nn.Linear, "head"])  # type: ignore[arg-type]
    assert callback.settings.include == ("Conv2d",)
    assert callback.settings.exclude == ("Linear", "head")


# --- what a callback and an artifact say of themselves


def test_a_callback_says_what_it_was_given() -> None:
    assert repr(lq.PostTrainingQuantization()) == "PostTrainingQuantization('int8', 'onnxruntime')"
    callback = lq.PostTrainingQuantization(
        "int8_dynamic", "torch", exclude="head", calibration={"num_batches": 4}, engine="onednn", output_dir="q"
    )
    again = eval(repr(callback), {"PostTrainingQuantization": lq.PostTrainingQuantization})
    assert repr(again) == repr(callback)
    assert repr(callback).startswith("PostTrainingQuantization('int8_dynamic', 'torch', ")
    assert {"exclude='head'", "calibration={'num_batches': 4}", "output_dir='q'"} <= set(
        repr(callback)[:-1].split(", ")
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("artifact") / "q"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so small a net grows
        return lq.quantize(NET, "int8_weight_only", "torch", calibration_data=[torch.randn(2, 8)], output_dir=folder)


def test_an_artifact_says_what_it_is_in_one_line(artifact: Any) -> None:
    assert repr(artifact).startswith(
        f"Artifact('{artifact.path}': int8_weight_only on torch, {artifact.size_bytes:,} bytes"
    )
    assert len(repr(artifact)) < 300
    assert artifact._repr_markdown_().startswith("# int8_weight_only on torch")
    frame = artifact._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts"')
    # Its quotes are the frame's alone: nothing of the page is part of the notebook.
    assert frame.count('"') == 6


@pytest.mark.parametrize("door", [lq.load, lq.verify])
def test_options_of_another_runtime_are_refused(door: Callable[..., Any], artifact: Any) -> None:
    with pytest.raises(QuantizationError, match=r"for runtime 'torch' .* got 'thread'\. Did you mean 'threads'"):
        door(artifact.path, thread=2)
    with pytest.raises(QuantizationError, match=r"got 'providers'"):
        door(artifact.path, providers=["CPUExecutionProvider"])
    with pytest.raises(QuantizationError, match=r"`threads` to be a positive integer or None, but got '2'"):
        door(artifact.path, threads="2")


def test_an_artifact_in_ones_own_module_is_validated_and_predicts(artifact: Any) -> None:
    class Lit(LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("sum", self.net(batch[0]).sum())

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0])

    data = DataLoader(TensorDataset(torch.randn(8, 8)), 4)
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, **options)
    lit = Lit(NET)
    before = trainer.validate(lit, data, verbose=False)[0]["sum"]
    lit.net = lq.load(artifact)
    predictions = torch.cat(trainer.predict(lit, data))
    assert trainer.validate(lit, data, verbose=False)[0]["sum"] == pytest.approx(before, abs=0.1)
    assert torch.equal(predictions, lq.load(artifact)(data.dataset.tensors[0]))


def test_a_state_dict_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(NET.state_dict(), path)
    for lightning_module in (LightningModule, LightningModule()):
        with pytest.raises(QuantizationError, match=r"Of a state dict: `module.load_state_dict"):
            lq.quantize(path, calibration_data=[torch.zeros(2, 8)], lightning_module=lightning_module)
