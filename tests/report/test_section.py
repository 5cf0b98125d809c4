"""A section says nothing of what it does not override."""

from dataclasses import dataclass

from reports import GOOD_VALUES

from lightning_quant.report.report import Report
from lightning_quant.report.section import Section


@dataclass(frozen=True)
class Bare(Section):
    number: int


@dataclass(frozen=True)
class Loud(Section):
    shout: str

    def text(self) -> str:
        return self.shout

    def failures(self) -> list[str]:
        return ["shouting FAILED"]

    def warnings(self) -> list[str]:
        return ["it is loud"]

    def scalars(self) -> dict[str, float | None]:
        return {"decibels": 90.0, "unknown": None}


def test_a_bare_section_has_its_fields_alone() -> None:
    bare = Bare(3)
    assert (bare.text(), bare.failures(), bare.warnings(), bare.scalars(), bare.figures()) == ("", [], [], {}, {})
    assert bare.to_dict() == {"number": 3}


def test_a_report_is_the_sum_of_its_sections() -> None:
    report = Report("int8", "torch", GOOD_VALUES["versions"], (Bare(3), Loud("HELLO")))

    assert report.warnings == ["shouting FAILED", "it is loud"]
    assert "HELLO" in report.to_markdown()
    assert report.to_dict()["number"] == 3
    assert report.scalars()["quant/decibels"] == 90.0
    assert "quant/unknown" not in report.scalars()
