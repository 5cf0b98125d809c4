"""PyTorch's transformer layers are written out for graphs and compute what they did."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from prepared_graphs import ready
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise


def test_a_transformer_layer_is_right_in_training_and_evaluation() -> None:
    """In evaluation PyTorch runs such a layer as one fused kernel that never calls the linear layers inside."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(x)).mean(1))

    model, x = Net().eval(), torch.randn(16, 6, 5)
    prepared = ready(model, x)
    with torch.no_grad():
        expected = model(x)
        with prepared.attached("frozen"):
            assert signal_to_noise(expected, model(x)) > 25
            model.train()
            assert signal_to_noise(expected, model(x)) > 25
        model.eval()
        assert signal_to_noise(expected, convert(prepared)(x)) > 25


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) * 2


class Placed(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(torch.arange(x.shape[1]))


class Doubled(nn.ConvTranspose1d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * 2


def test_layers_without_an_integer_form_are_stored_also_with_a_forward_of_their_own() -> None:
    torch.manual_seed(0)
    places = [nn.Linear(16, 16), Placed(8, 16), nn.Conv1d(6, 6, 3), nn.ReLU(), Doubled(6, 6, 2)]
    model, ids = nn.Sequential(Scaled(50, 16), *places, nn.Linear(15, 3)).eval(), torch.randint(50, (4, 6))
    prepared = prepare(model, (ids,), observer="min_max", trains=False)
    calibrate(prepared, steps_of(prepared, [(ids,)]))

    actions = {row.name: row.action for row in prepared.plan.rows}
    assert [actions[name] for name in ("0", "2", "5")] == ["int8 weights"] * 3
    assert [actions[name] for name in ("1", "3", "6")] == ["int8"] * 3
    _, output = prepared.converted(static_sizes=True)
    assert 20 < signal_to_noise(model(ids), output) < 80


class Own(nn.MultiheadAttention):
    """Attends to itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("trains", [True, False])
def test_an_attention_of_the_users_own_is_written_out_too(trains: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Own(8, 2, batch_first=True), nn.Linear(8, 4)), torch.randn(3, 5, 8)
    prepared = prepare(model.eval(), (x,), trains=trains)
    with torch.no_grad(), prepared.attached("observe"):
        observed = model(x)

    assert {row.name for row in prepared.plan.rows if row.action == "int8"} == {"0", "1", "1.out_proj", "2"}
    with torch.no_grad():
        torch.testing.assert_close(observed, model(x))
