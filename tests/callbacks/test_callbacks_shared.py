from lightning_quant.callbacks.shared import Alone, Shared


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
