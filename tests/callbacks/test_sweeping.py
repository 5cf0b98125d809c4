"""Several recipes and runtimes from one training."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from features import feature
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, Recorder, equal_tensors, fit, images, seeded, tensors_of
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, load
from lightning_quant.artifact.artifact import read
from lightning_quant.callbacks import ptq, sweeping
from lightning_quant.search.sweep import Sweep

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


class Linears(Classifier):
    """Two linear layers, and validation in enough batches for intervals."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4)))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(48, seed=2), 8)


def sweep(
    folder: Path, recipe: Any = ("int8", "int8_weight_only"), runtime: Any = "onnxruntime", **arguments: Any
) -> Any:
    return PostTrainingQuantization(
        list(recipe) if isinstance(recipe, tuple) else recipe,
        runtime,
        output_dir=folder,
        calibration={"num_batches": 2},
        **arguments,
    )


@feature("Several artifacts", "`recipe=[...]`, `runtime=[...]`: one capture, one calibration, one table", only="PTQ")
def test_every_recipe_on_every_runtime_has_a_folder_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    run = ptq.calibration_steps
    monkeypatch.setattr(ptq, "calibration_steps", lambda *a: steps.append(a) or run(*a))
    callback = sweep(tmp_path / "all", ("int8", "int8_weight_only"), ["onnxruntime", "torch"])
    logger = CSVLogger(tmp_path / "logs")
    trainer = fit(Linears(), callback, logger=logger)
    names = {f"{recipe}-{runtime}" for recipe in ("int8", "int8_weight_only") for runtime in ("onnxruntime", "torch")}
    made = callback.artifact
    assert isinstance(made, Sweep)
    assert set(made.artifacts) == names == {path.name for path in (tmp_path / "all").iterdir() if path.is_dir()}
    # The user's training step ran for the first of the calibrated alone.
    assert len(steps) == 1
    for name, artifact in made.artifacts.items():
        assert f"{artifact.manifest['recipe']}-{artifact.manifest['runtime']}" == name
        assert f"quant/{name}/size_ratio" in trainer.callback_metrics
        load(artifact.path)
    # One table: the recommended first, and the same numbers as in the reports.
    table = json.loads((tmp_path / "all" / "sweep.json").read_text())
    assert table["recommended"] == table["points"][0]["name"] == made.points[0].name == made.path.name
    for point in table["points"]:
        report = read(tmp_path / "all" / point["name"]).report or {}
        assert point["size_bytes"] == report["artifact_bytes"]
        assert point["metrics"] == {row["name"]: row["artifact"] for row in report["metrics"]}
    assert (tmp_path / "all" / "sweep.md").read_text() == made.text()
    page = (tmp_path / "all" / "sweep.html").read_text()
    assert all(name in page for name in names)
    assert page.count("<circle") == len(names)
    logger.save()
    logged = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert all(f"quant/sweep/{name}/recommended" in logged for name in names)


def test_members_are_the_artifacts_of_runs_of_their_own(tmp_path: Path) -> None:
    callback, single = sweep(tmp_path / "all"), sweep(tmp_path / "one", "int8")
    for each in (callback, single):
        fit(seeded(Linears), each)
    one, member = single.artifact, callback.artifact.artifacts["int8-onnxruntime"]
    assert member.manifest["sha256"]["model.onnx"] == one.manifest["sha256"]["model.onnx"]
    assert member.report["metrics"] == one.report["metrics"]
    assert member.report["changed"] == one.report["changed"]


def test_training_is_as_without_the_callback(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [sweep(tmp_path)]):
        model = seeded(Linears)
        fit(model, *callbacks)
        states.append(tensors_of(model))
    assert equal_tensors(*states)


def test_what_cannot_be_made_is_told_before_training_and_costs_the_others_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    said: list[int] = []
    callback = sweep(tmp_path, "int8_dynamic", ["executorch", "onnxruntime"])
    warn = sweeping.warn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeping, "warn", lambda text: said.append(recorder.num_batches) or warn(text))
        fit(Linears(), recorder, callback)
    rows = {point.name: point for point in callback.artifact.points}
    missing = [name for name, point in rows.items() if point.artifact is None]
    assert missing
    assert "onnxruntime" not in " ".join(missing)
    assert said == [0] * len(missing)
    assert all(rows[name].reason in callback.artifact.text().replace("\\", "") or rows[name].reason for name in missing)
    assert callback.artifact.points[-1].name in missing


def test_a_member_that_fails_at_the_end_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = ptq.finish

    def failing(callback: Any, *arguments: Any) -> Any:
        if callback.settings.recipe.name == "int8":
            raise RuntimeError("a kernel of another library")
        return finish(callback, *arguments)

    monkeypatch.setattr(ptq, "finish", failing)
    callback = sweep(tmp_path)
    fit(Linears(), callback)
    assert [p.reason for p in callback.artifact.points] == ["", "a kernel of another library"]
    assert "not made: a kernel of another library" in (tmp_path / "sweep.md").read_text()
    monkeypatch.setattr(ptq, "finish", lambda *_: (_ for _ in ()).throw(RuntimeError("none works")))
    with pytest.raises(MisconfigurationException, match="none was made: none works"):
        fit(Linears(), sweep(tmp_path))


def test_an_interruption_at_the_end_keeps_what_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = ptq.finish

    def interrupted(callback: Any, *arguments: Any) -> Any:
        if callback.settings.recipe.name != "int8":
            raise KeyboardInterrupt
        return finish(callback, *arguments)

    monkeypatch.setattr(ptq, "finish", interrupted)
    callback = sweep(tmp_path, ("int8", "int8_weight_only", "float16"))
    fit(Linears(), callback)
    assert [point.reason for point in callback.artifact.points] == ["", "interrupted", "interrupted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": ["int8", "int9"]}, "Did you mean 'int8'"),
        ({"recipe": []}, "an empty list"),
        ({"runtime": ["onnxruntime", "onxruntime"]}, "Did you mean 'onnxruntime'"),
        ({"limits": {"val_acuracy": -0.1}}, "'val_accuracy' was probably meant"),
        ({"module": "nets"}, "nets"),
        ({"recipe": ["int8_dynamic"], "runtime": ["executorch"]}, "executorch"),
    ],
)
def test_what_no_member_can_is_refused_before_training(arguments: Any, message: str, tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(MisconfigurationException, match=message):
        fit(Linears(), recorder, sweep(tmp_path, **arguments))
    assert recorder.num_batches == 0


def test_training_through_rounding_takes_one_recipe(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="PostTrainingQuantization makes the others"):
        QuantizationAwareTraining(["int8", "int4_weights"], output_dir=tmp_path)  # type: ignore[arg-type]


def test_keys_of_several_callbacks_do_not_collide(tmp_path: Path) -> None:
    first, second = sweep(tmp_path / "1", "int8", ["onnxruntime"]), sweep(tmp_path / "2", ["int8"], name="mine")
    single = sweep(tmp_path / "3", "int8")
    trainer = fit(Linears(), first, second, single, limit_val_batches=1)
    keys = [name for name in trainer.callback_metrics if name.endswith("/size_ratio")]
    assert keys[:2] == [f"quant/{name}-int8-onnxruntime/size_ratio" for name in ("sweep1", "mine")]
    assert len(set(keys)) == len(keys) == 3
    with pytest.raises(MisconfigurationException, match="`output_dir` of its own"):
        fit(Linears(), sweep(tmp_path / "1", ["int8"]), sweep(tmp_path / "1", ["float16"]))


def test_a_sweep_is_copied_pickled_and_written_out_again(tmp_path: Path) -> None:
    callback = sweep(tmp_path, [{"name": "int8", "overrides": {"head": "float"}}, "float16"], ["torch"])
    again = eval(repr(callback), {"PostTrainingQuantization": PostTrainingQuantization})
    assert repr(again) == repr(callback)
    assert "'torch'" in repr(callback)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback)), again):
        assert type(other) is type(callback)
        assert [settings.recipe for settings in other._settings().values()] == [
            settings.recipe for settings in callback._settings().values()
        ]


def test_recipes_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    callback = sweep(tmp_path, [{"name": "a b"}, {"name": "a b", "bias_correction": False}, {"name": "a b"}])
    fit(Linears(), callback, limit_val_batches=0)
    assert set(callback.artifact.artifacts) == {"a_b-onnxruntime", "a_b-onnxruntime-2"}


def test_limits_are_searched_for_each_member(tmp_path: Path) -> None:
    callback = sweep(tmp_path, ("int8", "float16"), limits={"val_accuracy": -0.5})
    fit(Linears(), callback)
    assert all("search" in artifact.report for artifact in callback.artifact.artifacts.values())


def test_a_checkpoint_is_swept_too(tmp_path: Path) -> None:
    trainer = fit(Linears())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    made = sweep(tmp_path / "all").quantize_checkpoint(tmp_path / "last.ckpt", Linears())
    assert isinstance(made, Sweep)
    assert len(made.artifacts) == 2
