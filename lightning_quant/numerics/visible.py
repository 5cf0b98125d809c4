"""Rows of a tensor that a mask does not hide."""

from torch import Tensor


def visible(x: Tensor, hidden: Tensor | None) -> Tensor:
    """Return the rows of a tensor that are not hidden, where it has a row for each place; else all of it.

    Args:
        x: `(batch, time, ...)`, `(time, batch, ...)`, `(batch, heads, time, ...)`, `(batch * time, ...)`, or another.
        hidden: `(batch, time)`, or None.
    """
    if hidden is None or hidden.shape[0] == hidden.shape[1] or x.dim() < 2:
        return x
    batch, time = hidden.shape
    keep = ~hidden
    if x.shape[0] == batch * time:
        return _rows(x, keep)
    has_heads = x.dim() == 4 and x.shape[0] == batch and x.shape[2] == time
    if has_heads:
        return x if x.shape[1] == time else _rows(x.transpose(1, 2).flatten(0, 1), keep)
    if x.dim() > 2 and x.shape[:2] == (batch, time):
        return _rows(x.flatten(0, 1), keep)
    return _rows(x.flatten(0, 1), keep.t()) if x.dim() > 2 and x.shape[:2] == (time, batch) else x


def _rows(x: Tensor, keep: Tensor) -> Tensor:
    # A mask as an index takes five times as long.
    return x.index_select(0, keep.flatten().nonzero().squeeze(1))
