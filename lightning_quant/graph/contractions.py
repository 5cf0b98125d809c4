"""Products with a parameter, however they are spelled, as linear layers; `einsum` of two tensors as a matrix product.

`x @ self.w`, `torch.addmm(self.b, x, self.w)`, `einsum("btd,dhk->bthk", x, self.w)` are what `F.linear` computes, with
values moved before and after it; so a runtime's table has one kind for them all.
"""

import math
import operator
import string
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from lightning_quant.graph.constants import ancestors, is_of_parameters

_PRODUCTS = (torch.matmul, operator.matmul, torch.mm, "matmul", "mm")


def rewritten(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], root: nn.Module) -> Any:
    """Return the proxy of an equal computation that tables know; None where the call stays as it is.

    Args:
        target: function or name of a method that is called.
        args: of the call, proxies among them.
        kwargs: of the call.
        root: module that is traced.
    """
    if kwargs:
        return None
    if target in _PRODUCTS and len(args) == 2:
        return _product(*args, root)
    if target in (torch.addmm, "addmm") and len(args) == 3:
        bias, x, weight = args
        if not _is_matrix(weight, root) or _is_weight(x, root):
            return None
        is_bias = _is_weight(bias, root) and len(_shape(bias)) == 1
        return F.linear(x, weight.t(), bias) if is_bias else F.linear(x, weight.t()) + bias
    if target is torch.einsum and args and isinstance(args[0], str):
        operands = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
        return _einsum(args[0], *operands, root=root) if len(operands) == 2 else None
    return None


def _product(left: Any, right: Any, root: nn.Module) -> Any:
    if _is_matrix(right, root) and _shape(left) and not _is_weight(left, root):
        return F.linear(left, right.t())
    if _is_matrix(left, root) and len(_shape(right)) > 1 and not _is_weight(right, root):
        return F.linear(right.transpose(-1, -2), left).transpose(-1, -2)
    return None


def _einsum(equation: str, left: Any, right: Any, *, root: nn.Module) -> Any:
    if _is_weight(left, root):
        left, right, equation = right, left, _swapped(equation)
    letters = _letters(equation, len(_shape(left)), len(_shape(right)))
    if letters is None or _is_weight(left, root):
        return None
    a, b, out = letters
    sizes = dict(zip(b, _shape(right), strict=True))
    batch = "".join(c for c in a if c in b and c in out)
    summed = "".join(c for c in a if c in b and c not in out)
    rows, columns = ("".join(c for c in own if c not in other) for own, other in ((a, b), (b, a)))
    fits = all(sizes.get(c, size) == size for c, size in zip(a, _shape(left), strict=True))
    if not (fits and summed and sorted(batch + rows + columns) == sorted(out)):
        return None
    if _is_weight(right, root) and not batch:
        x, weight = _moved(left, a, rows + summed), _moved(right, b, columns + summed)
        if len(summed) != 1 or len(columns) != 1:
            x = x.flatten(len(rows)) if len(summed) > 1 else x
            weight = weight.reshape(math.prod(sizes[c] for c in columns), math.prod(sizes[c] for c in summed))
        y = F.linear(x, weight)
        if len(columns) != 1:
            y = y.unflatten(-1, tuple(sizes[c] for c in columns)) if columns else y.squeeze(-1)
        return _moved(y, rows + columns, out)
    if len(rows) == len(columns) == len(summed) == 1 and not _is_weight(right, root):
        x, y = _moved(left, a, batch + rows + summed), _moved(right, b, batch + summed + columns)
        return _moved(torch.matmul(x, y), batch + rows + columns, out)
    return None


def _letters(equation: str, *ranks: int) -> tuple[str, str, str] | None:
    """Return a letter for each dimension of both operands and of the result; None where one stands twice."""
    taken, _, result = equation.replace(" ", "").partition("->")
    terms = taken.split(",")
    counts = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    spare = [c for c in string.ascii_letters if c not in equation][: max(counts)]
    if min(ranks) == 0 or any(n < 0 or (n and "..." not in term) for n, term in zip(counts, terms, strict=True)):
        return None
    if "->" not in equation:
        result = "..." * ("..." in taken) + "".join(sorted(c for c in set(taken) - {",", "."} if taken.count(c) == 1))
    named = [term.replace("...", "".join(spare[len(spare) - n :])) for term, n in zip(terms, counts, strict=True)]
    a, b, out = *named, result.replace("...", "".join(spare))
    return (a, b, out) if all(len(set(term)) == len(term) for term in (a, b, out)) else None


def _swapped(equation: str) -> str:
    taken, arrow, result = equation.partition("->")
    return f"{','.join(reversed(taken.split(',')))}{arrow}{result}"


def _moved(x: Any, letters: str, order: str) -> Any:
    return x if letters == order else x.permute([letters.index(c) for c in order])


def _shape(value: Any) -> tuple[int, ...]:
    fake = value.node.meta.get("fake") if isinstance(value, fx.Proxy) else value
    return tuple(fake.shape) if isinstance(fake, Tensor) else ()


def _is_matrix(value: Any, root: nn.Module) -> bool:
    return len(_shape(value)) == 2 and _is_weight(value, root)


def _is_weight(value: Any, root: nn.Module) -> bool:
    """Tell whether a value is computed from parameters alone, and one of them is no table that is looked up in.

    Fixed matrices stay what they are: a spectrum by a matrix of waves, say, spans more than eight bits hold.
    """
    if not isinstance(value, fx.Proxy):
        return False
    return is_of_parameters(value.node) and any(_is_parameter(node, root) for node in ancestors(value.node))


def _is_parameter(node: fx.Node, root: nn.Module) -> bool:
    if node.op != "get_attr":
        return node.op == "call_module"
    owner, _, name = str(node.target).rpartition(".")
    module = root.get_submodule(owner)
    return name in module._parameters and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
