"""Products of groups of rows, each with a weight of its own."""

import pytest
import torch

from lightning_quant.layers.grouped import grouped_product


def test_each_group_is_multiplied_by_its_weight_and_what_is_behind_them_is_zero() -> None:
    x, weight = torch.randn(7, 4), torch.randn(3, 4, 5)
    result = grouped_product(x, weight, torch.tensor([2, 2, 6]))

    torch.testing.assert_close(result[:2], x[:2] @ weight[0])
    torch.testing.assert_close(result[2:6], x[2:6] @ weight[2])
    assert not result[6:].any()
    assert torch.equal(torch.ops.lightning_quant.grouped_product(x, weight, torch.tensor([2, 2, 6])), result)


@pytest.mark.parametrize("ends", [[2, 1, 6], [2, 4, 8], [-1, 4, 6], [2, 4]])
def test_groups_that_do_not_lie_in_the_rows_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="rows"):
        grouped_product(torch.randn(7, 4), torch.randn(3, 4, 5), torch.tensor(ends))
