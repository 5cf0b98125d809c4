"""Why an exporter refuses a module, in the user's names and with the place in the user's code."""

import builtins

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lightning_quant.runtimes._reasons import first_line, reason, sizes_watched


def test_the_first_line_is_that_of_the_cause() -> None:
    cause = RuntimeError("\n  the cause\nand more")
    error = ValueError("around it")
    error.__cause__ = cause
    assert first_line(error) == "the cause"
    assert first_line(KeyError()) == "KeyError"


def test_inputs_are_called_by_the_users_names_and_hints_are_kept() -> None:
    text = "L['tensors'][1].size()[0] = 8 is not equal to L['args'][0]. For more information, read\n"
    text += "Suggested fixes:\n  batch = 2*half\n"
    said = reason(ValueError(text), ("image", "mask"), ["net.py:3 `x`"])

    assert said.startswith("dimension 0 of `mask` = 8 is not equal to `image`")
    assert "(PyTorch suggests batch = 2*half)" in said
    assert said.endswith("at net.py:3 `x`")
    assert "read" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Constraints violated (x)! For more information, read", "Constraints violated (x)"),
        ("sizes differ at dimension 2)", "sizes differ at dimension 2"),
    ],
)
def test_sentences_go_on_behind_what_is_said(text: str, said: str) -> None:
    assert reason(ValueError(text), (), []) == said


def test_the_place_of_a_call_that_raised_is_said() -> None:
    text = 'no\n\nThe following call raised this error:\n  File "/home/me/net.py", line 12, in forward\n'
    text += "    y = x.view(3)\n"
    assert reason(ValueError(text), (), []).endswith("at /home/me/net.py:12 `y = x.view(3)`")


def test_lengths_are_sizes_while_a_block_runs_and_all_is_put_back() -> None:
    before = builtins.len, ShapeEnv._set_replacement
    with pytest.raises(KeyError), sizes_watched() as places:  # noqa: PT012
        assert len(torch.ones(3, 2)) == 3
        assert len([1, 2]) == 2
        assert builtins.len is not before[0]
        assert places == []
        raise KeyError
    assert (builtins.len, ShapeEnv._set_replacement) == before
