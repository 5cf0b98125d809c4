"""Whole numbers in float tensors are what integer kernels compute."""

import torch

from lightning_quant.numerics.integer import add, requantize


def test_sums_are_rounded_to_even_by_one_multiplication() -> None:
    sums = torch.tensor([1.0, 3.0, 5.0, -1.0, -3.0])
    assert requantize(sums, torch.tensor(0.5), torch.tensor(1.0)).tolist() == [0, 2, 2, 0, -2]
    assert requantize(sums, torch.tensor(0.5), torch.tensor(1.0), torch.floor).tolist() == [0, 1, 2, -1, -2]


def test_sums_of_two_grids_are_exact_to_the_last_bit() -> None:
    grids = ((torch.tensor(0.37), torch.tensor(3.0)), (torch.tensor(1.9), torch.tensor(200.0)))
    output = torch.tensor(0.81), torch.tensor(17.0)
    first, second = (torch.randint(0, 256, (4096,)).double() for _ in range(2))
    values = [(q.float() - zero) * scale for q, (scale, zero) in zip((first, second), grids, strict=True)]
    ratios = [(scale / output[0]).double() for scale, _ in grids]
    fixed = (output[1] - (ratios[0].float() * grids[0][1] + ratios[1].float() * grids[1][1])).double()
    inner = (second * ratios[1] + fixed).float().double()
    expected = torch.round((first * ratios[0] + inner).float()) - output[1]

    integers = [q.float() - zero for q, (_, zero) in zip((first, second), grids, strict=True)]
    assert torch.equal(add(*integers, grids, output), expected)
    # Summing up in float and rounding once is not what kernels do.
    careless = torch.round((values[0] + values[1]) / output[0])
    assert float((careless - expected).abs().max()) <= 1


def test_operands_of_a_sum_are_broadcast_whichever_is_smaller() -> None:
    grid = torch.tensor(0.5), torch.tensor(0.0)
    small, large = torch.randint(-9, 9, (2, 1, 3)).float(), torch.randint(-9, 9, (2, 4, 3)).float()
    assert torch.equal(add(small, large, (grid, grid), grid), small + large)
    assert torch.equal(add(large, small, (grid, grid), grid), small + large)
