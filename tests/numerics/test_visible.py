"""Rows that a mask does not hide."""

import torch

from lightning_quant.numerics.visible import visible

LENGTHS = torch.tensor([7, 3, 5, 2])


HIDDEN = torch.arange(7)[None] >= LENGTHS[:, None]


def test_visible_rows_of_every_form() -> None:
    kept = int(LENGTHS.sum())
    forms = {(4, 7, 8): kept, (7, 4, 8): kept, (28, 8): kept, (4, 2, 7, 3): kept, (4, 7, 7, 3): 4, (5, 8): 5, (4,): 4}
    assert {shape: visible(torch.zeros(shape), HIDDEN).shape[0] for shape in forms} == forms
    assert visible(torch.zeros(3, 3, 8), torch.eye(3, dtype=torch.bool)).shape == (3, 3, 8)
