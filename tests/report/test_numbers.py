"""Pictures of operators' numbers for loggers."""

from lightning_quant.measure.operator_numbers import Histogram, OperatorNumbers
from lightning_quant.report.numbers import Numbers

HISTOGRAM = Histogram(-1.0, 1.0, -1.0, 3.0, (1, 5, 2, 0), 0.25, 0.1)


def test_the_noisiest_operators_are_drawn_with_names_as_they_are() -> None:
    names = ("quiet", "loud", "$x$", "b", "c")
    noise = (50.0, 5.0, 10.0, 20.0, 30.0)
    every = tuple(OperatorNumbers(n, None, db, HISTOGRAM, None) for n, db in zip(names, noise, strict=True))
    figure = Numbers((*every, OperatorNumbers("undrawn", None, 1.0)), {}).figures()["histograms"]()
    titles = [axes.get_title() for axes in figure.axes]

    assert titles[::2] == [f"{name}: weight, in steps" for name in ("loud", r"\$x\$", "b", "c")]
    assert figure.axes[0].get_xlabel() == "25.00% clipped"
    assert Numbers((OperatorNumbers("undrawn", None, 1.0),), {}).figures() == {}
