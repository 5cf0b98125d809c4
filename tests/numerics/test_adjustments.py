from lightning_quant.numerics.adjustments import AccuracyStep, outcomes


def step(name: str, *, kept: bool, changed: int = 3) -> AccuracyStep:
    return AccuracyStep(name, 20.0, 21.0, kept, changed, 2.0)


def test_steps_that_changed_nothing_are_one_line() -> None:
    gained = step("equalize", kept=True)
    steps = (step("absorb", kept=False), gained, step("migrate", kept=True, changed=0), step("smooth", kept=False))
    assert outcomes(steps) == (str(gained), "tried without a gain, and left out: absorb, migrate, smooth (6 s)")
    assert outcomes(steps[:1]) == (str(steps[0]),)
    assert outcomes(()) == ()
