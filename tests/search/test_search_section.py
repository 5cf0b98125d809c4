from lightning_quant.measure.contributions import Difference
from lightning_quant.report.limits import limits_from
from lightning_quant.search.choice import FLOAT, Choice, Measured, Trial
from lightning_quant.search.judge import Judge
from lightning_quant.search.progress import SearchRecord
from lightning_quant.search.section import SearchSection, relaxed

JUDGE = Judge(limits_from({"acc": -0.01, "size_ratio": 0.3}), {})


def trial(choice: Choice, drop: float, size: int, margin: float | None = None) -> Trial:
    measured = Measured({"acc": 0.9 - drop}, {"acc": Difference(-drop, margin)}, size, size / 1000)
    return Trial(choice, measured, JUDGE(measured), 1.0)


WHOLE = trial(Choice(), 0.05, 250)
FLOATING = trial(Choice((("head", FLOAT),)), 0.002, 400)
MORE = trial(Choice((("head", FLOAT), ("conv", FLOAT))), 0.001, 700)


def test_each_missed_limit_says_what_the_cheapest_way_to_it_costs() -> None:
    found = SearchRecord([WHOLE, MORE, FLOATING], 4, "the end")
    assert relaxed(found, WHOLE) == [
        ("acc", "0.01", "0.05", "head kept float", "0.002", "+150 bytes, acc +0.048"),
    ]
    assert relaxed(found, FLOATING) == [
        ("size_ratio", "0.3", "0.4", "the whole recipe", "0.25", "-150 bytes, acc -0.048"),
    ]
    text = SearchSection("size", found, WHOLE).text()
    assert "3 validations of exported files, over a ranking of 4 steps" in text
    assert "+150 bytes" in text


def test_a_limit_that_only_the_interval_misses_fails_in_its_words() -> None:
    unsure = trial(Choice(), 0.008, 250, margin=0.005)
    (text,) = SearchSection("size", SearchRecord([unsure]), unsure).failures()
    assert "limits FAILED: acc may get worse by 0.01396, more than 0.01" in text
    assert "97.5%" in text
    assert SearchSection("size", SearchRecord([FLOATING]), FLOATING).failures() == []
