import json

from lightning_quant.report.scored_weights import ScoredWeights, WeightsSection


def test_weights_that_are_not_the_artifact_are_a_row_too() -> None:
    last = ScoredWeights("weights are the last ones", True, {"acc": 0.9}, "acc gets worse by 0.01 of 0.02", True, 1000)
    best = ScoredWeights("weights are the best ones, from a.ckpt", False, {"loss": 0.5}, "acc", False, 2000)
    section = WeightsSection((last, best))
    header, _, *rows = section.text().splitlines()
    assert [cell.strip() for cell in header.split("|")[1:5]] == ["scored on its file", "keeps limits", "acc", "loss"]
    assert ["(the artifact)" in row for row in rows] == [True, False]
    assert "0.9" in rows[0]
    assert json.loads(json.dumps(section.to_dict()))["scored_weights"][1]["metrics"] == {"loss": 0.5}
