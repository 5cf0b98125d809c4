"""Small nets of the layers that recipes of layers quantize, and references that are written out here."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_quant.recipe.recipe import RECIPES, LayerRecipe

VOCABULARY, WIDTH = 96, 32
LAYER_RECIPES = sorted(name for name, recipe in RECIPES.items() if isinstance(recipe, LayerRecipe))


class Around(nn.Module):
    """A module that only calls a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


class TokenClassifier(nn.Module):
    """An embedding, a recurrent layer and a linear one; the embedding and the head may share their weight."""

    def __init__(self, *, tied: bool = False, kind: str = "LSTM", layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = getattr(nn, kind)(WIDTH, WIDTH, layers, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY if tied else 4, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0][:, -1])


class Packed(nn.Module):
    """A recurrent layer over sequences of lengths that differ."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(16, 8, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Return token ids."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, storage: str) -> Tensor:
    """Return a weight as its stored form has it, in float32: one step for each row, groups of 32, or half precision."""
    if storage in ("float16", "bfloat16"):
        return weight.to(getattr(torch, storage)).float()
    if storage == "int8":
        step = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1)) / 127
        return (weight / step).round() * step
    groups = weight.reshape(len(weight), -1, 32)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    return ((groups / (extreme / -8)).round().clamp(-8, 7) * (extreme / -8)).reshape(weight.shape)


def with_rounded_weights(layer: nn.Module, storage: str, *, transposed: bool = False) -> Any:
    """Return a float copy of a layer whose weights, not its biases, are rounded."""
    duplicate = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in duplicate.named_parameters():
            if parameter.dim() > 1 and "bias" not in name:
                value = rounded(parameter.t(), storage).t() if transposed else rounded(parameter, storage)
                parameter.copy_(value)
    return duplicate.eval()


@functools.cache
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 24, "n_embd": WIDTH, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()


@functools.cache
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


@functools.cache
def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=24, num_labels=3)
    return BertForSequenceClassification(config).eval()


@functools.cache
def t5(*, tied: bool = False) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    config = T5Config(
        **sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=tied, decoder_start_token_id=0, eos_token_id=None
    )
    return T5ForConditionalGeneration(config).eval()
