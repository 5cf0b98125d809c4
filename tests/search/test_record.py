import json
import math
from dataclasses import replace
from pathlib import Path

from torch import nn

from lightning_quant.artifact.folder import SEARCH, check_folder
from lightning_quant.measure.contributions import Difference
from lightning_quant.search.choice import FLOAT, Choice, Measured, Trial, Verdict
from lightning_quant.search.progress import SearchRecord
from lightning_quant.search.record import fingerprint, load, save


def found() -> SearchRecord:
    measured = Measured(
        {"acc": 0.9, "odd": math.nan}, {"acc": Difference(-0.1, 0.01), "odd": Difference(math.nan)}, 10, 0.3
    )
    verdict = Verdict("acc", 0.2, 0.11, 0.1, kept=True, basis="interval", on_metric=True)
    trials = [
        Trial(Choice(), measured, (verdict,), 1.5),
        Trial(Choice((("b", FLOAT), ("a", FLOAT))), None, (), 0.5, "no file"),
        Trial(Choice(accurate=True), replace(measured, share=0.5), (verdict,), 2.0, validations=0.5),
    ]
    return SearchRecord(trials, 7, "an interruption")


def test_trials_are_read_back_as_they_were(tmp_path: Path) -> None:
    save(tmp_path / "new", found(), "size", "mark")
    read = load(tmp_path / "new", "mark")
    assert [trial.choice for trial in read.trials] == [trial.choice for trial in found().trials]
    assert read.trials[0].verdicts == found().trials[0].verdicts
    assert read.trials[0].measured is not None
    assert read.trials[0].measured.metrics["acc"] == 0.9
    assert math.isnan(read.trials[0].measured.metrics["odd"])
    assert read.trials[1].error == "no file"
    assert (read.trials[0].validations, read.trials[2].validations) == (1.0, 0.5)
    assert [one.is_whole for one in read.trials] == [True, True, False]
    # A search that was cut short leaves a folder that its next run may write to.
    assert check_folder(tmp_path / "new") == (tmp_path / "new").resolve()


def test_another_search_begins_anew(tmp_path: Path) -> None:
    save(tmp_path, found(), "size", "mark")
    assert load(tmp_path, "another").trials == []
    for damaged in ("", "{}", json.dumps({"schema_version": 1, "fingerprint": "mark", "trials": [3]})):
        (tmp_path / SEARCH).write_text(damaged)
        assert load(tmp_path, "mark").trials == []
    (tmp_path / SEARCH).unlink()
    assert load(tmp_path, "mark").trials == []


def test_a_fingerprint_tells_weights_and_settings_apart() -> None:
    layer, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert fingerprint(layer, 1) == fingerprint(other, 1) != fingerprint(layer, 2)
    other.running_mean += 1  # type: ignore[operator]
    assert fingerprint(layer, 1) != fingerprint(other, 1)
