"""`nn.MultiheadAttention` with quantized projections; scores, softmax and weighted sums stay in float."""

from typing import Any

from torch import Tensor, nn

from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.linear import linear
from lightning_quant.layers.storage import Scheme
from lightning_quant.numerics.attention import attend


class StoredAttention(StoredLayer):
    """Multi-head attention whose four projections are stored layers."""

    # `nn.TransformerEncoderLayer` would pass the weights to a float kernel if this were true.
    _qkv_same_embed_dim = False

    @classmethod
    def refusal(cls, float_layer: nn.Module, scheme: Scheme, group_size: int) -> str:
        """Return why a layer has no such form, or an empty text."""
        return "no 4-bit form" if scheme.storage == "int4" else ""

    @classmethod
    def multiply_adds_apart(cls, float_layer: nn.Module, args: Any, kwargs: Any) -> int:
        """Return those of scores and weighted sums, which stay in float."""
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        query, key = given["query"], given["key"]
        length = key.shape[1 if float_layer.batch_first and query.dim() == 3 else 0]
        return 2 * query.numel() * length

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention.forward` does; arguments are as there."""
        return attend(self._float_layer, self._project, self._output, *args, **kwargs)

    def _project(self, *sources: Tensor) -> tuple[Tensor, ...]:
        is_one = sources[0] is sources[1] and sources[1] is sources[2]
        return self._project_one(sources[0]) if is_one else self._project_each(*sources)

    def _project_one(self, x: Tensor) -> tuple[Tensor, ...]:
        if "in_proj_weight" not in self.names:
            return self._project_each(x, x, x)
        bias = self._parameters.get("in_proj_bias")
        return linear(x, *self.stored("in_proj_weight"), bias, self.scheme.arithmetic).chunk(3, -1)

    def _project_each(self, *sources: Tensor) -> tuple[Tensor, ...]:
        if "in_proj_weight" in self.names:
            weight, scale = self.stored("in_proj_weight")
            scales = (None,) * 3 if scale is None else scale.chunk(3)
            stored = list(zip(weight.chunk(3), scales, strict=True))
        else:
            stored = [self.stored(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        bias = self._parameters.get("in_proj_bias")
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        arithmetic = self.scheme.arithmetic
        return tuple(linear(x, *w, b, arithmetic) for x, w, b in zip(sources, stored, biases, strict=True))

    def _output(self, x: Tensor) -> Tensor:
        return linear(x, *self.stored("out_proj.weight"), self._parameters.get("out_proj_bias"), self.scheme.arithmetic)
