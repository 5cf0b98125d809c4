"""Networks of tables and of sets of points, and language models of `transformers` from small configurations."""

import itertools

import torch
import torch.nn.functional as F  # noqa: N812
from network_cases import Case, points, rows, tokens
from torch import Tensor, nn

CATEGORIES = [500, 200, 50]


def _layers(*sizes: int) -> nn.Sequential:
    pairs = list(itertools.pairwise(sizes))
    return nn.Sequential(*(layer for i, o in pairs for layer in (nn.Linear(i, o), nn.ReLU())))


class _Recommender(nn.Module):
    """Products of embeddings. Source: Naumov et al. 2019, "Deep Learning Recommendation Model"."""

    def __init__(self, numbers: int = 13, dim: int = 16) -> None:
        super().__init__()
        self.numbers, self.bottom = numbers, _layers(numbers, 64, dim)
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum") for n in CATEGORIES)
        self.top = nn.Sequential(_layers(dim + 6, 64, 32), nn.Linear(32, 1))
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1))

    def forward(self, x: Tensor) -> Tensor:
        dense, ids = self.bottom(x[:, : self.numbers]), x[:, self.numbers :].long()
        every = torch.stack([dense, *(table(ids[:, k : k + 1]) for k, table in enumerate(self.tables))], 1)
        products = torch.bmm(every, every.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, products], 1)).sigmoid()


def dlrm() -> Case:
    """EmbeddingBags and products of their rows."""
    return Case(_Recommender(), rows(13, CATEGORIES))


class _DeepFm(nn.Module):
    """Source: Guo et al. 2017, "DeepFM"."""

    def __init__(self, numbers: int = 8, dim: int = 16) -> None:
        super().__init__()
        self.numbers = numbers
        self.tables = nn.ModuleList(nn.Embedding(n, dim) for n in CATEGORIES)
        self.linear = nn.ModuleList(nn.Embedding(n, 1) for n in CATEGORIES)
        self.deep = nn.Sequential(_layers(numbers + 3 * dim, 128, 64), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        ids = x[:, self.numbers :].long()
        every = torch.stack([table(ids[:, k]) for k, table in enumerate(self.tables)], 1)
        crossed = 0.5 * (every.sum(1).square() - every.square().sum(1)).sum(1, keepdim=True)
        linear = sum(table(ids[:, k]) for k, table in enumerate(self.linear))
        return linear + crossed + self.deep(torch.cat([x[:, : self.numbers], every.flatten(1)], 1))


def deepfm() -> Case:
    """Embeddings, squares of sums."""
    return Case(_DeepFm(), rows(8, CATEGORIES))


class _TabTransformer(nn.Module):
    """Attention among columns. Source: Huang et al. 2020, "TabTransformer"."""

    def __init__(self, numbers: int = 8, dim: int = 32) -> None:
        super().__init__()
        self.numbers, self.tables = numbers, nn.ModuleList(nn.Embedding(n, dim) for n in CATEGORIES)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.1, "gelu", batch_first=True)
        self.encoder, self.norm = nn.TransformerEncoder(layer, 2), nn.LayerNorm(numbers)
        self.head = nn.Sequential(_layers(numbers + 3 * dim, 128), nn.Linear(128, 2))

    def forward(self, x: Tensor) -> Tensor:
        numbers, ids = x[:, : self.numbers], x[:, self.numbers :].long()
        columns = self.encoder(torch.stack([table(ids[:, k]) for k, table in enumerate(self.tables)], 1))
        return self.head(torch.cat([columns.flatten(1), self.norm(numbers)], 1))


def tab_transformer() -> Case:
    """Numbers beside embedded categories."""
    return Case(_TabTransformer(), rows(8, CATEGORIES))


def autoencoder() -> Case:
    """Linear layers with BatchNorm."""
    sizes = (64, 128, 32, 8, 32, 128)
    pairs = itertools.pairwise(sizes)
    layers = [layer for i, o in pairs for layer in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
    return Case(nn.Sequential(*layers, nn.Linear(128, 64)), rows(64, []))


class _DeepSets(nn.Module):
    """Source: Zaheer et al. 2017, "Deep Sets"."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.whole = _layers(3, 64, 64), nn.Sequential(_layers(128, 64), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        y = self.each(x)
        return self.whole(torch.cat([y.mean(1), y.max(1).values], 1))


def deep_sets() -> Case:
    """Means and maxima over a set."""
    return Case(_DeepSets(), points(64))


class _PointNet(nn.Module):
    """Source: Qi et al. 2017, "PointNet", with its transform of the input."""

    def __init__(self) -> None:
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv1d(i, o, 1), nn.BatchNorm1d(o), nn.ReLU())  # noqa: E731
        self.look, self.turn = (
            nn.Sequential(conv(3, 32), conv(32, 64)),
            nn.Sequential(_layers(64, 32), nn.Linear(32, 9)),
        )
        self.each = nn.Sequential(conv(3, 64), conv(64, 64), conv(64, 128))
        self.head = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        turn = self.turn(self.look(x).max(2).values).view(-1, 3, 3) + torch.eye(3)
        y = self.each(torch.bmm(turn.transpose(1, 2), x))
        return F.log_softmax(self.head(y.max(2).values), 1)


def pointnet() -> Case:
    """Shared layers over points, a transform from the points themselves."""
    return Case(_PointNet(), points(96))


class _Logits(nn.Module):
    """Calls a model of `transformers` with ids alone and returns its first result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False, return_dict=False)[0]


class _Encoded(_Logits):
    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, return_dict=False)[0]


def bert() -> Case:
    """Source: Devlin et al. 2019, "BERT", as `transformers` has it."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384}
    return Case(_Encoded(BertForSequenceClassification(BertConfig(vocab_size=1000, **sizes))), tokens(1000, 32))


def gpt2() -> Case:
    """Source: Radford et al. 2019, GPT-2, as `transformers` has it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=1000, n_positions=64, n_embd=96, n_layer=3, n_head=4)
    return Case(_Logits(GPT2LMHeadModel(config)), tokens(1000, 32))


def llama() -> Case:
    """Source: Touvron et al. 2023, "LLaMA", as `transformers` has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1000, num_key_value_heads=2, **sizes)
    return Case(_Logits(LlamaForCausalLM(config)), tokens(1000, 32))
