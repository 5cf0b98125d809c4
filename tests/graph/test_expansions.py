"""PyTorch's transformer layers are written out for graphs and compute what they did."""

import torch
from prepared_graphs import ready
from torch import Tensor, nn

from lightning_quant.export.convert import convert
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
