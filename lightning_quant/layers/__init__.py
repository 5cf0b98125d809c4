"""Quantized layers: what takes the place of one float layer, weights stored and used as a `Scheme` says.

A new kind of layer is one file with a class derived from `StoredLayer`, and a line in `_CLASSES`.
"""

from collections.abc import Callable

from torch import nn

from lightning_quant.layers import grouped  # noqa: F401
from lightning_quant.layers.attention import StoredAttention
from lightning_quant.layers.derived import is_derived
from lightning_quant.layers.embedding import StoredEmbedding, StoredEmbeddingBag, row_factor
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.linear import StoredLinear
from lightning_quant.layers.products import MIN_VALUES
from lightning_quant.layers.recurrent import StoredCell, StoredRecurrent

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CLASSES: tuple[tuple[tuple[type[nn.Module], ...], type[StoredLayer]], ...] = (
    ((nn.Linear,), StoredLinear),
    ((nn.Embedding,), StoredEmbedding),
    ((nn.EmbeddingBag,), StoredEmbeddingBag),
    ((nn.LSTM, nn.GRU, nn.RNN), StoredRecurrent),
    ((nn.LSTMCell, nn.GRUCell, nn.RNNCell), StoredCell),
    ((nn.MultiheadAttention,), StoredAttention),
    (_CONVOLUTIONS, StoredLayer),
)

# Kinds whose subclasses may compute what they like of their weights: those are float again when their forward runs.
_OPEN = (
    *(nn.Linear, nn.Embedding, nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.MultiheadAttention),
    *_CONVOLUTIONS,
)

KINDS = tuple(kind for kinds, _ in _CLASSES for kind in kinds)


def may_have_layers(root: nn.Module) -> Callable[[nn.Module], bool]:
    """Return what tells whether recipes of layers may quantize something at or under a module of a tree.

    Where none of the tree is a layer that they know, they can store what the code of modules multiplies by.
    """

    def has_weights(module: nn.Module) -> bool:
        return any(p.dim() > 1 and p.numel() >= MIN_VALUES for p in module.parameters())

    return has_layers if has_layers(root) else has_weights


def has_layers(module: nn.Module) -> bool:
    """Tell whether a layer that has a quantized form is at or under a module."""
    return any(class_for(child) is not None for child in module.modules())


def class_for(layer: nn.Module) -> type[StoredLayer] | None:
    """Return the class that can take a layer's place; None when there is none.

    A subclass with a forward of its own computes something else than its base: it gets its weights in float, unless it
    is a table whose rows are scaled, or calls the forward of a recurrence or a bag, which is that of the stored form.
    """
    kind = type(layer)
    if (kind.__name__, kind.__module__) == ("Conv1D", "transformers.pytorch_utils"):
        return StoredLinear
    if issubclass(kind, StoredLayer):
        return None
    if isinstance(layer, nn.MultiheadAttention) and (layer.bias_k is not None or layer.add_zero_attn):
        return StoredLayer
    for kinds, stored in _CLASSES:
        if any(isinstance(layer, base) and kind.forward is base.forward for base in kinds):
            return stored
    if isinstance(layer, nn.Embedding) and row_factor(layer) is not None:
        return StoredEmbedding
    if is_derived(layer):
        return next(stored for kinds, stored in _CLASSES if isinstance(layer, kinds))
    return StoredLayer if isinstance(layer, _OPEN) else None
