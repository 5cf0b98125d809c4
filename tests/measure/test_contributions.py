import math

import pytest
import torch

from lightning_quant.measure.contributions import (
    difference,
    gamma_quantile,
    of_means,
    of_samples,
    skewed_margin,
    student_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(4, 2.1318), (5, 2.0150), (10, 1.8125), (63, 1.6694), (1000, 1.6464)]
)
def test_quantiles_are_those_of_tables(degrees: int, expected: float) -> None:
    assert student_quantile(0.95, degrees) == pytest.approx(expected, rel=5e-3)


def test_the_margin_of_a_mean_is_that_of_the_paired_test() -> None:
    torch.manual_seed(0)
    x, half = torch.randn(40).double(), 0.1 * torch.randn(20).double()
    noise = torch.cat([half, -half]) + 0.01
    found = difference(
        float((x + noise).mean()), float(x.mean()), of_samples((x + noise).tolist()), of_samples(x.tolist())
    )
    # What all samples have in common is left out: the spread is that of the differences alone.
    assert found.margin == pytest.approx(student_quantile(0.95, 39) * float(noise.std()) / math.sqrt(40), rel=1e-6)
    assert found.worst(higher_is_better=True) == pytest.approx(-float(noise.mean()) + (found.margin or 0))


def test_one_in_twenty_intervals_of_no_difference_leaves_it_out() -> None:
    generator = torch.Generator().manual_seed(1)
    outside = 0
    for _ in range(400):
        values = torch.randn(12, generator=generator).tolist()
        found = difference(sum(values) / 12, 0.0, of_samples(values), of_samples([0.0] * 12))
        outside += found.worst(higher_is_better=True) < 0
    assert 0.02 < outside / 400 < 0.08


def test_no_interval_is_told_with_its_reason() -> None:
    few, many, others = of_samples([1.0] * 3), of_samples([1.0] * 8), of_means([1.0] * 8, [2.0] * 8)
    assert "no contribution" in difference(1.0, 1.0, None, many).why
    assert "too few" in difference(1.0, 1.0, few, few).why
    assert "not the same" in difference(1.0, 1.0, many, others).why


def test_where_no_sample_differs_the_interval_is_that_of_what_was_not_seen() -> None:
    found = difference(0.9, 0.9, *[of_samples([1.0] * 90 + [0.0] * 10)] * 2)
    # Clopper and Pearson's for no event in a hundred, by tables.
    assert found.margin == pytest.approx(0.0295, abs=1e-4)
    assert found.worst(higher_is_better=True, confidence=0.99) == pytest.approx(1 - 0.01 ** (1 / 100))
    # Batches count by their samples, and percent by their span.
    batches = of_means([90.0] * 8, [50.0] * 8)
    assert difference(90.0, 90.0, batches, batches).margin == pytest.approx(90 * (1 - 0.05 ** (1 / 400)))
    one = of_samples([1.0] * 89 + [0.0] * 11)
    few = difference(0.89, 0.9, one, of_samples([1.0] * 90 + [0.0] * 10))
    # Of one in a hundred 0.0466.
    assert few.margin == pytest.approx(0.0366, abs=1e-4)
    # Of what differs everywhere the spread tells.
    all_differ = difference(0.5, 0.4, of_samples([0.5 + 1e-3 * (i % 2) for i in range(100)]), of_samples([0.4] * 100))
    assert all_differ.margin is not None
    assert all_differ.margin < 1e-3


def test_files_that_would_be_worse_are_seldom_taken_for_good_when_few_samples_differ() -> None:
    generator, wrong = torch.Generator().manual_seed(0), 0
    allowed, number = 0.02, 200
    for _ in range(400):
        # Truly worse by a little more than is allowed.
        worse = (torch.rand(number, generator=generator) < 1.02 * allowed).tolist()
        found = difference(
            1 - sum(worse) / number, 1.0, of_samples([1.0 - w for w in worse]), of_samples([1.0] * number)
        )
        wrong += found.worst(higher_is_better=True) <= allowed
    assert wrong / 400 <= 0.05


def test_quantiles_of_gamma_distributions_are_those_of_tables() -> None:
    # Of two times the sum of four exponentials, chi squared with eight degrees: 15.507.
    assert gamma_quantile(0.95, 2 / math.sqrt(4)) == pytest.approx((15.507 / 2 - 4) / 2, abs=1e-3)
    assert gamma_quantile(0.95, 0.0) == pytest.approx(1.6449, abs=1e-4)
    assert gamma_quantile(0.95, 2e-3) == pytest.approx(gamma_quantile(0.95, 0.0), abs=1e-3)


@pytest.mark.parametrize(("counted", "bound"), [(1, 4.744), (3, 7.754), (10, 16.962)])
def test_where_a_few_blocks_decide_the_bound_is_that_of_their_count(counted: int, bound: float) -> None:
    # Of very many blocks; bounds of Poisson's distribution by tables.
    blocks = [1.0] * counted + [0.0] * (20_000 - counted)
    mean = counted / 20_000
    assert counted + skewed_margin([x - mean for x in blocks]) == pytest.approx(bound, rel=1e-3)


@pytest.mark.slow
def test_sums_that_few_samples_make_worse_are_seldom_taken_for_good() -> None:
    generator, wrong, share, number = torch.Generator().manual_seed(0), 0, 0.005, 400
    for _ in range(number):
        # A large error of one sample in two hundred, and another small one in all.
        lost = (torch.rand(2048, generator=generator) < share).double() + 1e-3 * torch.rand(2048, generator=generator)
        blocks = of_means(lost.view(64, 32).mean(1).tolist(), [32.0] * 64)
        found = difference(float(lost.mean()), 0.0, blocks, of_means([0.0] * 64, [32.0] * 64))
        wrong += found.worst(higher_is_better=False) <= 0.98 * (share + 5e-4)
    assert wrong / number <= 0.05
