"""Recurrent layers: int8 weights with a scale for each gate's row, float arithmetic in the recurrence.

Why no integer recurrence: torch.ao's and ONNX Runtime's LSTM kernels take one activation scale for the whole input
sequence. With inputs of a wide range (each time step times exp(3 n), n normal) torch.ao's output is at 1 dB of the
float one, and int8 weights with float arithmetic at 47. Milliseconds of 100 steps, one thread, on a Xeon with VNNI
(batch, features): float (1, 64) 0.21, torch.ao 1.62, these 0.23; (32, 64) 2.0, 3.4, 2.0; (1, 512) 22, 3.0, 29;
(16, 512) 67, 26, 65. So torch.ao gains where weights outgrow the cache, and only while inputs stay tame. Taking the
input projection out and quantizing its rows leaves a loop in Python: 79 to 90 where float takes 67 to 83.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_quant.layers.derived import call_derived, is_derived
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.linear import linear
from lightning_quant.layers.storage import Scheme, dequantize

_LIBRARY = torch.library.Library("lightning_quant", "FRAGMENT")
_LIBRARY.define(
    "recurrent(Tensor x, Tensor[] state, Tensor[] weights, Tensor[] biases, str mode, int num_layers, "
    "bool bidirectional, bool batch_first, Tensor? lengths=None) -> Tensor[]"
)


class StoredRecurrent(StoredLayer):
    """An LSTM, GRU or RNN over sequences.

    A weight that code around the layer sets before each call, as weight drop does (Merity et al. 2018, section 2), is
    what that code made of a stored parameter beside it, such as `weight_hh_l0_raw`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the float layer's forward, with its sequence operator replaced by one on dequantized weights."""
        layer = self._float_layer
        values = {name: dequantize(*self.stored(name)) for name in self.names}
        values |= {name: getattr(self, attribute) for name, attribute in self.shared.items()}
        inner = functools.partial(self._recur, values)
        return call_derived(layer, inner, values, args, kwargs) if is_derived(layer) else inner(*args, **kwargs)

    def _poison(self, name: str) -> Tensor:
        original = self._unreadable[name]
        is_source = original not in self._float_layer._flat_weights_names
        return dequantize(*self.stored(original)) if is_source else super()._poison(name)

    def _recur(self, values: dict[str, Tensor], input: Any, hx: Any = None) -> Any:
        layer = self._float_layer
        # Here and no earlier: a subclass's own forward sets weights, too.
        flat = [values[name] if name in values else getattr(self, name) for name in layer._flat_weights_names]
        is_packed = isinstance(input, PackedSequence) and not is_padded(input)
        if is_packed or (isinstance(input, Tensor) and input.dim() == 2):
            # Copies of the layer are made of the list that stands here.
            before, layer._flat_weights = layer._flat_weights, flat
            try:
                return getattr(nn, layer.mode.partition("_")[0]).forward(layer, input, hx)
            finally:
                layer._flat_weights = before
        return run(layer, flat, input, hx)


def is_padded(sequence: PackedSequence) -> bool:
    """Tell whether a sequence is packed in name only, as `layers.packed` has it: `data` `(batch, time, features)`."""
    return sequence.data.dim() == 3


def run(layer: nn.RNNBase, flat: list[Tensor], x: Any, state: Any) -> Any:
    """Run a recurrence by one operator.

    Args:
        layer: for its settings.
        flat: float32 weights and biases in the layer's order.
        x: `(batch, time, features)`, or time first, as the layer has it; or such a sequence, packed in name only.
        state: hidden state, with the cell state of an LSTM; None for zeros.
    """
    packed = x if isinstance(x, PackedSequence) else None
    values, batch_first = (x, layer.batch_first) if packed is None else (packed.data, True)
    states = [] if state is None else list(state) if layer.mode == "LSTM" else [state]
    if packed is not None and packed.sorted_indices is not None:
        states = [tensor.index_select(1, packed.sorted_indices) for tensor in states]
    weights, biases = (
        [value for name, value in zip(layer._flat_weights_names, flat, strict=True) if name.startswith(kind)]
        for kind in ("weight", "bias")
    )
    output, *after = torch.ops.lightning_quant.recurrent(
        *(values, states, weights, biases, layer.mode, layer.num_layers, layer.bidirectional, batch_first),
        None if packed is None else packed.batch_sizes.sum(0),
    )
    if packed is not None:
        if packed.unsorted_indices is not None:
            after = [tensor.index_select(1, packed.unsorted_indices) for tensor in after]
        output = PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
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
    lengths: Tensor | None = None,
) -> list[Tensor]:
    """Run PyTorch's own recurrence; one operator, since an exported program would hold every time step otherwise.

    Args:
        x: `(time, batch, features)`, or batch first.
        state: hidden state, and cell state of an LSTM, each `(layers * directions, batch, hidden)`; empty for zeros.
        weights: float32, of input and hidden state, and of the projection if there is one, for each layer and direction
            in PyTorch's order.
        biases: in the same order, or empty.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        num_layers: how many are stacked.
        bidirectional: whether each layer runs both ways.
        batch_first: whether the batch is the first dimension of `x`.
        lengths: `(batch,)`, at least 1: what lies behind gives zeros and does not count for the states.
    """
    number = num_layers * (2 if bidirectional else 1)
    each = len(weights) // number
    parts = [(weights[i * each : (i + 1) * each], biases[2 * i : 2 * i + 2]) for i in range(number)]
    flat = [tensor for own, bias in parts for tensor in (*own[:2], *bias, *own[2:])]
    functions: dict[str, Any] = {
        "LSTM": torch.lstm,
        "GRU": torch.gru,
        "RNN_TANH": torch.rnn_tanh,
        "RNN_RELU": torch.rnn_relu,
    }
    options = (flat, bool(biases), num_layers, 0.0, False, bidirectional)
    state = [tensor.to(x.dtype) for tensor in state] or _zeros(x, weights, number, mode, batch_first)
    if lengths is None:
        return list(functions[mode](x, state if mode == "LSTM" else state[0], *options, batch_first))
    axis, length = (0, x.shape[1]) if batch_first else (1, x.shape[0])
    lengths, order = lengths.cpu().sort(descending=True)
    data, sizes = torch._VF._pack_padded_sequence(x.index_select(axis, order), lengths, batch_first)
    state = [tensor.index_select(1, order) for tensor in state]
    result, *after = functions[mode](data, sizes, state if mode == "LSTM" else state[0], *options)
    padded, _ = torch._VF._pad_packed_sequence(result, sizes, batch_first, 0.0, length)
    back = order.argsort()
    return [padded.index_select(axis, back), *(tensor.index_select(1, back) for tensor in after)]


def _zeros(x: Tensor, weights: list[Tensor], number: int, mode: str, batch_first: bool) -> list[Tensor]:
    """Return the states before the first step, where none are given."""
    batch = x.shape[0] if batch_first else x.shape[1]
    hidden = x.new_zeros(number, batch, weights[1].shape[1])
    return [hidden, x.new_zeros(number, batch, weights[1].shape[0] // 4)] if mode == "LSTM" else [hidden]


def _shapes(
    x: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    mode: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
) -> list[Tensor]:
    directions = 2 if bidirectional else 1
    features = weights[1].shape[1] * directions
    state = state or _zeros(x, weights, num_layers * directions, mode, batch_first)
    return [x.new_empty(*x.shape[:-1], features), *(tensor.new_empty(tensor.shape) for tensor in state)]


_LIBRARY.impl("recurrent", recurrent, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_quant::recurrent", _shapes, lib=_LIBRARY)
