from types import SimpleNamespace
from typing import Any

import pytest

from lightning_quant.callbacks import shared as module
from lightning_quant.callbacks.shared import Alone, Shared
from lightning_quant.recipe import recipe as recipes


def test_what_is_shared_is_made_once_until_it_is_given_up() -> None:
    made: list[int] = []
    shared = Shared()
    for _ in range(2):
        assert shared.once("key", lambda: made.append(1)) is None
    shared.once("other", lambda: made.append(2))
    assert made == [1, 2]
    shared.clear()
    shared.once("key", lambda: made.append(3))
    assert made == [1, 2, 3]


def test_alone_nothing_is_kept() -> None:
    alone, number = Alone(), iter(range(3))
    assert [alone.once("key", lambda: next(number)) for _ in range(3)] == [0, 1, 2]


def test_what_exports_alike_is_exported_on_trial_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(module, "trial_export", lambda model, **how: len(tried.append((model.name, how)) or tried))

    def model(recipe: Any, runtime: str) -> Any:
        known = recipes.get(recipe)
        plan = SimpleNamespace(runtime=runtime)
        return SimpleNamespace(name=known.name, recipe=known, plan=plan, found_sizes=lambda: (known.name,))

    other_bits = {"name": "int8", "overrides": {"head": "float"}}
    shared, models = Shared(), [model(r, "a") for r in ("int8", "int8_accurate", "int4_weights", other_bits, "float16")]
    models.append(model("int8", "b"))
    got = [shared.tried(one, engine="auto") for one in models]
    assert got == [
        (1, ("int8",)),
        (1, ("int8",)),
        (2, ("int4_weights",)),
        *((n, (name,)) for n, name in ((3, "int8"), (4, "float16"), (5, "int8"))),
    ]
    assert tried[0] == ("int8", {"engine": "auto"})
    alone = Alone()
    assert [alone.tried(one)[0] for one in models[:2]] == [6, 7]
