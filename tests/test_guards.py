"""Every guard is missed by a test when it is taken out."""

import json
from pathlib import Path

import guards
import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda guard: guard.name.replace(" ", "-"))
def test_a_test_goes_red_without_the_guard(guard: guards.Guard, tmp_path: Path) -> None:
    red = guards.red_tests(guards.take_out(guard, tmp_path), guard.tests)
    guards.record(guard, red)

    assert red


def test_guards_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    for index, guard in enumerate(guards.GUARDS):
        guards.take_out(guard, tmp_path / str(index))


def test_every_guard_has_been_recorded() -> None:
    recorded = json.loads(guards.RECORD.read_text())

    assert set(recorded) == guards.NAMES
    assert all(recorded.values())
