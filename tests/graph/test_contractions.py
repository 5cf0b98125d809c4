"""Products with parameters run in integers, however they are spelled, and compute what they did."""

from collections.abc import Callable

import torch
from prepared_graphs import ready
from torch import Tensor, nn

from lightning_quant.export.convert import convert
from lightning_quant.numerics.noise import signal_to_noise


class Net(nn.Module):
    """Answers with what several functions of one tensor and of parameters of their own compute."""

    def __init__(self, *cases: tuple[Callable[..., Tensor], list[tuple[int, ...]]]) -> None:
        super().__init__()
        self.before, self.computed = nn.Linear(8, 8), [compute for compute, _ in cases]
        self.weights = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.randn(shape) * 0.3) for shape in shapes) for _, shapes in cases
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.before(x)
        return [compute(x, *weights) for compute, weights in zip(self.computed, self.weights, strict=True)]


def test_a_product_with_a_parameter_runs_in_integers() -> None:
    model, x = (
        Net(
            (lambda x, w: x @ w, [(8, 6)]),
            (lambda x, w: x.flatten(0, 1).mm(w), [(8, 6)]),
            (lambda x, w: w @ x, [(6, 5)]),
            (lambda x, w: x.matmul(w.t()), [(6, 8)]),
            (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), [(8, 6), (6,)]),
            (lambda x, w: torch.einsum("btd,dhk->bthk", x, w), [(8, 2, 3)]),
            (lambda x, w: torch.einsum("b t d, h k d -> b h t k", x, w), [(2, 3, 8)]),
            (lambda x, w: torch.einsum("vw,bwc->bvc", w, x), [(6, 5)]),
            (lambda x, w: torch.einsum("...d,de->...e", [x, w]), [(8, 3)]),
            (lambda x, w: torch.einsum("btd,tdk->bk", x, w), [(5, 8, 3)]),
            (lambda x, w: torch.einsum("btd,d", x, w), [(8,)]),
        ).eval(),
        torch.randn(4, 5, 8),
    )
    prepared = ready(model, x)
    assert [row.action for row in prepared.plan.rows] == ["int8"] * 12
    with torch.no_grad():
        expected, converted = model(x), convert(prepared)(x)
        with prepared.attached("frozen"):
            trained = model.train()(x)
    for output, *others in zip(expected, converted, trained, strict=True):
        assert all(other.shape == output.shape and signal_to_noise(output, other) > 30 for other in others)


def test_what_is_no_linear_layer_says_so() -> None:
    model = Net(
        (lambda x, w: torch.bmm(x.transpose(0, 1), w), [(5, 8, 3)]),
        (lambda x, w: torch.einsum("btd,tdk->btk", x, w), [(5, 8, 3)]),
    )
    reasons = {row.kind: row.reason for row in ready(model.eval(), torch.randn(4, 5, 8)).plan.rows}
    assert "a stack of matrices" in reasons["bmm"]
    assert "no product by one matrix" in reasons["einsum"]


def test_fixed_matrices_stay_what_they_are() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("waves", torch.randn(8, 6))
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x @ self.waves).abs().log1p())

    rows = ready(Spectrum().eval(), torch.randn(4, 8)).plan.rows
    assert [row.action for row in rows if row.kind == "matmul"] == ["float"]


def test_products_of_two_activations_are_matrix_products() -> None:
    def attend(x: Tensor, w: Tensor) -> Tensor:
        y = torch.relu(x @ w)
        return torch.einsum("b i d, b j d -> b i j", y, y) @ y

    rows = ready(Net((attend, [(8, 8)])).eval(), torch.randn(4, 5, 8)).plan.rows
    assert {row.kind for row in rows} == {"Linear", "linear", "relu", "matmul"}
