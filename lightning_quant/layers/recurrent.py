"""Recurrent layers: int8 weights with a scale for each gate's row, float arithmetic in the recurrence.

Why no integer recurrence: torch.ao's and ONNX Runtime's LSTM kernels take one activation scale for the whole input
sequence. With inputs of a wide range (each time step times exp(3 n), n normal) torch.ao's output is at 1 dB of the
float one, and int8 weights with float arithmetic at 47. Milliseconds of 100 steps, one thread, on a Xeon with VNNI
(batch, features): float (1, 64) 0.21, torch.ao 1.62, these 0.23; (32, 64) 2.0, 3.4, 2.0; (1, 512) 22, 3.0, 29;
(16, 512) 67, 26, 65. So torch.ao gains where weights outgrow the cache, and only while inputs stay tame. Taking the
input projection out and quantizing its rows leaves a loop in Python: 79 to 90 where float takes 67 to 83.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.linear import linear
from lightning_quant.layers.storage import Scheme, dequantize

_LIBRARY = torch.library.Library("lightning_quant", "FRAGMENT")
_LIBRARY.define(
    "recurrent(Tensor x, Tensor[] state, Tensor[] weights, Tensor[] biases, str mode, int num_layers, "
    "bool bidirectional, bool batch_first) -> Tensor[]"
)


class StoredRecurrent(StoredLayer):
    """An LSTM, GRU or RNN over sequences."""

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a layer has no such form, or an empty text."""
        return (
            "a projected state has no quantized form"
            if float_layer.proj_size
            else super().refusal(float_layer, scheme, group_size)
        )

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the float layer's forward, with its sequence operator replaced by one on dequantized weights."""
        x, state, layer = input, hx, self._float_layer
        values = {name: dequantize(*self.stored(name)) for name in self.names}
        values |= {name: self.get_parameter(attribute) for name, attribute in self.shared.items()}
        flat = [values[name] for name in layer._flat_weights_names]
        if isinstance(x, PackedSequence) or x.dim() == 2:
            layer._flat_weights = flat
            try:
                return layer(x, state)
            finally:
                layer._flat_weights = []
        states = _initial_state(layer, x) if state is None else [state] if isinstance(state, Tensor) else list(state)
        weights, biases = (
            [value for name, value in zip(layer._flat_weights_names, flat, strict=True) if name.startswith(kind)]
            for kind in ("weight", "bias")
        )
        output, *after = torch.ops.lightning_quant.recurrent(
            x, states, weights, biases, layer.mode, layer.num_layers, layer.bidirectional, layer.batch_first
        )
        return output, tuple(after) if layer.mode == "LSTM" else after[0]


class StoredCell(StoredLayer):
    """One step of an LSTM, GRU or RNN: two linear layers and gates."""

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a layer has no such form, or an empty text."""
        return "no 4-bit form" if scheme.storage == "int4" else ""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Take one step from `input` `(batch, input_size)` or `(input_size,)`."""
        x, state, layer = input, hx, self._float_layer
        if state is None:
            zeros = x.new_zeros(*x.shape[:-1], layer.hidden_size)
            state = (zeros, zeros) if isinstance(layer, nn.LSTMCell) else zeros
        hidden = state[0] if isinstance(layer, nn.LSTMCell) else state
        parameters = self._parameters
        from_input = linear(x, *self.stored("weight_ih"), parameters.get("bias_ih"), self.scheme.arithmetic)
        from_hidden = linear(hidden, *self.stored("weight_hh"), parameters.get("bias_hh"), self.scheme.arithmetic)
        if isinstance(layer, nn.LSTMCell):
            i, f, g, o = (from_input + from_hidden).chunk(4, -1)
            cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(cell), cell
        if isinstance(layer, nn.GRUCell):
            (r, z, n), (hr, hz, hn) = from_input.chunk(3, -1), from_hidden.chunk(3, -1)
            update = torch.sigmoid(z + hz)
            return (1 - update) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + update * hidden
        return (torch.tanh if layer.nonlinearity == "tanh" else torch.relu)(from_input + from_hidden)


@torch.no_grad()
def recurrent(
    x: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    mode: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """Run PyTorch's own recurrence; one operator, since an exported program would hold every time step otherwise.

    Args:
        x: `(time, batch, features)`, or batch first.
        state: hidden state, and cell state of an LSTM, each `(layers * directions, batch, hidden)`.
        weights: float32, of input and hidden state for each layer and direction in PyTorch's order.
        biases: in the same order, or empty.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        num_layers: how many are stacked.
        bidirectional: whether each layer runs both ways.
        batch_first: whether the batch is the first dimension of `x`.
    """
    flat = [t for i in range(0, len(weights), 2) for t in (*weights[i : i + 2], *biases[i : i + 2])]
    functions: dict[str, Any] = {
        "LSTM": torch.lstm,
        "GRU": torch.gru,
        "RNN_TANH": torch.rnn_tanh,
        "RNN_RELU": torch.rnn_relu,
    }
    options = (flat, bool(biases), num_layers, 0.0, False, bidirectional, batch_first)
    state = [tensor.to(x.dtype) for tensor in state]
    return list(functions[mode](x, state if mode == "LSTM" else state[0], *options))


def _initial_state(layer: nn.RNNBase, x: Tensor) -> list[Tensor]:
    batch = x.shape[0] if layer.batch_first else x.shape[1]
    zeros = x.new_zeros(layer.num_layers * (2 if layer.bidirectional else 1), batch, layer.hidden_size)
    return [zeros, zeros] if layer.mode == "LSTM" else [zeros]


def _shapes(
    x: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    mode: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    features = state[0].shape[-1] * (2 if bidirectional else 1)
    return [x.new_empty(*x.shape[:-1], features), *(tensor.new_empty(tensor.shape) for tensor in state)]


_LIBRARY.impl("recurrent", recurrent, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_quant::recurrent", _shapes, lib=_LIBRARY)
