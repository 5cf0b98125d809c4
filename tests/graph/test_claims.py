"""Each multiply-add of a call belongs to one row."""

from lightning_quant.graph.claims import Claim, settle
from lightning_quant.graph.counting import ObservedCall
from lightning_quant.graph.plan import Row


def test_operators_get_no_more_than_was_counted() -> None:
    observed = ObservedCall()
    observed.multiply_adds["a"]["bmm"] = 10
    claims = [Claim(Row("a.matmul", "matmul", "int8", macs=30), "a", "operator") for _ in range(2)]
    assert [row.macs for row in settle(claims, observed)] == [5, 5]


def test_an_unknown_counted_operator_has_a_row_of_its_own() -> None:
    observed = ObservedCall()
    observed.multiply_adds["a.b"].update({"bmm": 4, "mm": 6})
    (row,) = settle([Claim(Row("a", "Linear", "int8", macs=1), "a", "layer")], observed)[1:]
    assert (row.name, row.kind, row.action, row.macs) == ("a.b.bmm+mm", "bmm, mm", "float", 10)
