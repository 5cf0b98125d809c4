"""Layers whose forward hides products with weights from a trace, written out in operators that graphs can round.

PyTorch's transformer layers are traced into; `nn.MultiheadAttention` and transformers' `Conv1D` are written out here.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from lightning_quant.numerics.attention import as_added, attend

_TRACED_INTO = (
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
# What graphs have no integer form of is called whole, also with a forward of its own: its weights are stored then.
WHOLE = (
    *(nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.Bilinear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

_PRODUCTS = frozenset((F.linear, F.conv1d, F.conv2d, F.conv3d))


def is_expanded(module: nn.Module) -> bool:
    """Tell whether a layer of PyTorch is no leaf of a trace."""
    return type(module) in _TRACED_INTO or expansion_of(module) is not None


def expansion_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return what a trace runs in place of a layer's forward; None for its own."""
    kind = type(module)
    if kind is nn.MultiheadAttention and _is_written_out(module):
        return lambda *args, **kwargs: _attention(module, *args, **kwargs)
    if kind is nn.Transformer:
        return lambda *args, **kwargs: _transformer(module, *args, **kwargs)
    if (kind.__name__, kind.__module__) == ("Conv1D", "transformers.pytorch_utils"):
        return lambda x: F.linear(x, module.weight.t(), module.bias)  # type: ignore[operator, arg-type]
    return None


def _is_written_out(layer: nn.Module) -> bool:
    return isinstance(layer, nn.MultiheadAttention) and layer.bias_k is None and not layer.add_zero_attn


def layer_read_by(node: fx.Node, root: nn.Module) -> str | None:
    """Return the path of the layer whose weight a product in an expansion, or in a layer of the user's, reads.

    The product is named after it. None where it is no such product.
    """
    scope = str(node.meta.get("scope", ""))
    if node.target not in _PRODUCTS or (layer := root.get_submodule(scope)) is None:
        return None
    if (
        not _is_written_out(layer)
        and expansion_of(layer) is None
        and any(name != "parametrizations" for name, _ in layer.named_children())
    ):
        return None
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    while isinstance(weight, fx.Node) and weight.op in ("call_function", "call_method") and weight.args:
        weight = weight.args[0]
    if not isinstance(weight, fx.Node) or weight.op not in ("get_attr", "call_module"):
        return None
    owner = str(weight.target).partition(".parametrizations.")[0].partition("parametrizations.")[0]
    return owner if weight.op == "call_module" or owner != weight.target else owner.rpartition(".")[0]


def _attention(layer: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    def project(*sources: Tensor) -> tuple[Tensor, ...]:
        bias = layer.in_proj_bias
        if layer._qkv_same_embed_dim and sources[0] is sources[1] and sources[1] is sources[2]:
            return tuple(F.linear(sources[0], layer.in_proj_weight, bias).chunk(3, -1))
        weights = (
            layer.in_proj_weight.chunk(3)
            if layer._qkv_same_embed_dim
            else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        )
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip(sources, weights, biases, strict=True))

    def finish(x: Tensor) -> Tensor:
        return F.linear(x, layer.out_proj.weight, layer.out_proj.bias)

    return attend(layer, project, finish, *args, **kwargs)


def _transformer(
    layer: Any,
    src: Tensor,
    tgt: Tensor,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    *causal: bool | None,
    **hints: bool | None,
) -> Tensor:
    """Encode and decode as `nn.Transformer.forward`, without its checks of sizes."""
    memory = layer.encoder(src, src_mask, src_key_padding_mask)
    padding = {
        "tgt_key_padding_mask": tgt_key_padding_mask,
        "memory_key_padding_mask": memory_key_padding_mask,
    }
    return layer.decoder(tgt, memory, tgt_mask, memory_mask, **padding)


@contextmanager
def transformers_traceable() -> Iterator[None]:
    """Let PyTorch's transformer layers be traced, whose checks of masks ask for types and values of tensors."""
    run = nn.MultiheadAttention.forward

    @functools.wraps(run)
    def attention(layer: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that a subclass calls as its own class's."""
        return (_attention if _is_written_out(layer) else run)(layer, *args, **kwargs)

    def canonical_mask(mask: Any, *_: Any, target_type: Any = None, **__: Any) -> Any:
        return None if mask is None else as_added(mask, target_type)

    with (
        mock.patch.object(nn.MultiheadAttention, "forward", attention),
        mock.patch.object(F, "_canonical_mask", canonical_mask),
        mock.patch.object(F, "_none_or_dtype", return_value=None),
        mock.patch.object(torch.nn.modules.transformer, "_get_seq_len", return_value=None),
        # A hint for kernels: what is masked, the mask says itself.
        mock.patch.object(torch.nn.modules.transformer, "_detect_is_causal_mask", return_value=False),
    ):
        yield
