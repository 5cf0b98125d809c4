import math

from lightning_quant.report.page import table_page
from lightning_quant.report.scatter import Dot, scatter


def test_dots_lie_where_their_numbers_are() -> None:
    dots = [Dot("a", 1e3, 0.5, "front"), Dot("b", 1e4, 0.7, "best"), Dot("c", 1e5, 0.9, "dominated")]
    chart = scatter(
        "bytes", "accuracy", [*dots, Dot("no number", 1e4, math.nan, "front"), Dot("free", 0.0, 0.5, "front")]
    )
    assert chart is not None
    (_, x1, y1, *_), (_, x2, y2, *_), (_, x3, y3, kind, at_left) = chart.dots
    assert abs((x2 - x1) - (x3 - x2)) < 1e-6
    assert abs((y1 - y2) - (y2 - y3)) < 1e-6
    assert 0 < y3 < y1 < chart.bottom
    assert chart.left < x1 < x3 < chart.width
    assert (kind, at_left) == ("dominated", False)
    assert next(text for _, text in chart.x_ticks).isdigit()
    assert scatter("bytes", "accuracy", dots[:1]) is None
    # Of one value, too.
    assert scatter("bytes", "accuracy", [dots[0], dots[0]]) is not None


def test_a_page_draws_every_dot_and_escapes_every_text() -> None:
    hostile = "<script>x</script>"
    chart = scatter("bytes", hostile, [Dot(hostile, 1.0, 1.0, "best"), Dot("b", 2.0, 1.0, "front")])
    assert chart is not None
    page = table_page(hostile, [hostile], [[hostile]], said=hostile, charts=[chart], lists=[(hostile, [hostile])])
    assert page.count("<circle") == 2
    assert hostile not in page
