"""Networks of audio, time series and text."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from network_cases import Case, images, series, tokens, waves
from networks_images import conv_norm
from torch import Tensor, nn


class _WaveBlock(nn.Module):
    """Source: van den Oord et al. 2016, "WaveNet"."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation, self.conv = dilation, nn.Conv1d(channels, 2 * channels, 2, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        signal, gate = self.conv(F.pad(x, (self.dilation, 0))).chunk(2, 1)
        y = signal.tanh() * gate.sigmoid()
        return x + self.residual(y), self.skip(y)


class _WaveNet(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first, self.blocks = nn.Conv1d(1, channels, 1), nn.ModuleList(_WaveBlock(channels, 2**k) for k in range(6))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(channels, 64, 1), nn.ReLU(), nn.Conv1d(64, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), 0.0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.last(total)


def wavenet() -> Case:
    """Gates, causal paddings, a last residual that nothing reads."""
    return Case(_WaveNet(), waves())


class _Temporal(nn.Module):
    """Source: Bai et al. 2018, "An Empirical Evaluation of Generic Convolutional and Recurrent Networks"."""

    def __init__(self, i: int, o: int, dilation: int) -> None:
        super().__init__()
        norm = torch.nn.utils.parametrizations.weight_norm
        self.pad = 2 * dilation
        self.one = norm(nn.Conv1d(i, o, 3, padding=self.pad, dilation=dilation))
        self.two = norm(nn.Conv1d(o, o, 3, padding=self.pad, dilation=dilation))
        self.shortcut = nn.Conv1d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x)[..., : -self.pad])
        y = F.relu(self.two(y)[..., : -self.pad])
        return F.relu(y + self.shortcut(x))


def tcn() -> Case:
    """Weight norm and cut ends."""
    blocks = [_Temporal(4, 32, 1), _Temporal(32, 32, 2), _Temporal(32, 32, 4)]
    return Case(nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10)), waves(4))


def vocoder() -> Case:
    """Transposed convolutions and LeakyReLU. Source: Kong et al. 2020, "HiFi-GAN"."""
    norm = torch.nn.utils.parametrizations.weight_norm
    layers: list[nn.Module] = [norm(nn.Conv1d(16, 64, 7, padding=3))]
    for i, o in ((64, 32), (32, 16)):
        layers += [nn.LeakyReLU(0.1), norm(nn.ConvTranspose1d(i, o, 8, 4, 2)), nn.LeakyReLU(0.1)]
        layers += [norm(nn.Conv1d(o, o, 3, padding=3, dilation=3))]
    return Case(
        nn.Sequential(*layers, nn.LeakyReLU(0.1), norm(nn.Conv1d(16, 1, 7, padding=3)), nn.Tanh()), waves(16, 64)
    )


class _ConformerBlock(nn.Module):
    """Source: Gulati et al. 2020, "Conformer"."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        feed = lambda: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))  # noqa: E731
        self.first, self.second, self.norm, self.last = feed(), feed(), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.conv_norm = nn.MultiheadAttention(dim, 4, batch_first=True), nn.LayerNorm(dim)
        self.up, self.down = nn.Conv1d(dim, 2 * dim, 1), nn.Conv1d(dim, dim, 1)
        self.depthwise, self.batch_norm = nn.Conv1d(dim, dim, 7, padding=3, groups=dim), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.glu(self.up(self.conv_norm(x).transpose(1, 2)), 1)
        x = x + self.down(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        return self.last(x + 0.5 * self.second(x))


def conformer() -> Case:
    """Attention, gated convolutions, half steps."""
    blocks = [_ConformerBlock(64) for _ in range(2)]
    return Case(nn.Sequential(nn.Linear(40, 64), *blocks, nn.Linear(64, 30)), series(64, 40))


class _Recurrent(nn.Module):
    def __init__(self, kind: type, features: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.rnn, self.head = kind(features, hidden, 2, batch_first=True), nn.Linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def lstm() -> Case:
    """Two layers and a linear one."""
    return Case(_Recurrent(nn.LSTM), series(40, 16))


def gru() -> Case:
    """Two layers and a linear one."""
    return Case(_Recurrent(nn.GRU), series(40, 16))


class _TextReader(nn.Module):
    """Convolutions and an LSTM over the columns of a line. Source: Shi et al. 2017, "CRNN"."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d((2, 1))
        self.convs = nn.Sequential(conv_norm(1, 16), nn.MaxPool2d(2), conv_norm(16, 32), pool, conv_norm(32, 64), pool)
        self.lstm, self.head = nn.LSTM(256, 48, bidirectional=True, batch_first=True), nn.Linear(96, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.convs(x).permute(0, 3, 1, 2).flatten(2))[0])


def crnn() -> Case:
    """Convolutions before an LSTM."""
    return Case(_TextReader(), images(1, 32))


class _TextCnn(nn.Module):
    """Source: Kim 2014, "Convolutional Neural Networks for Sentence Classification"."""

    def __init__(self, vocabulary: int = 2000, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.convs = nn.ModuleList(nn.Conv1d(dim, 32, k) for k in (3, 4, 5))
        self.head = nn.Linear(96, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).max(2).values for conv in self.convs], 1))


def text_cnn() -> Case:
    """An embedding holds most of the weights."""
    return Case(_TextCnn(), tokens(2000, 32))


class _Encoder(nn.Module):
    """Source: Vaswani et al. 2017, "Attention Is All You Need"."""

    def __init__(self, vocabulary: int = 1000, dim: int = 64) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, dim), nn.Parameter(0.1 * torch.randn(1, 32, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(dim, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids) * math.sqrt(64) + self.positions).mean(1))


def transformer_encoder() -> Case:
    """PyTorch's encoder over tokens."""
    return Case(_Encoder(), tokens(1000, 32))


class _Basis(nn.Module):
    """Source: Oreshkin et al. 2020, "N-BEATS"."""

    def __init__(self, past: int, future: int, width: int = 128) -> None:
        super().__init__()
        layers = [layer for i in (past, width, width) for layer in (nn.Linear(i, width), nn.ReLU())]
        self.layers, self.back, self.forth = nn.Sequential(*layers), nn.Linear(width, past), nn.Linear(width, future)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers(x)
        return x - self.back(y), self.forth(y)


class _NBeats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Basis(64, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, total = x[:, 0], 0.0
        for block in self.blocks:
            x, part = block(x)
            total = total + part
        return total


def nbeats() -> Case:
    """Residuals of signals."""
    return Case(_NBeats(), waves(1, 64))


class _Gated(nn.Module):
    """Source: Lim et al. 2021, "Temporal Fusion Transformers"."""

    def __init__(self, i: int, dim: int) -> None:
        super().__init__()
        self.one, self.two, self.gate = nn.Linear(i, dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.skip, self.norm = (nn.Linear(i, dim) if i != dim else nn.Identity()), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.skip(x) + F.glu(self.gate(self.two(F.elu(self.one(x)))), -1))


class _Fusion(nn.Module):
    """Chooses among variables, reads them by an LSTM, attends, answers quantiles."""

    def __init__(self, features: int = 6, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(1, dim) for _ in range(features))
        self.each = nn.ModuleList(_Gated(dim, dim) for _ in range(features))
        self.choose, self.lstm = _Gated(features * dim, features), nn.LSTM(dim, dim, batch_first=True)
        self.attention, self.after = nn.MultiheadAttention(dim, 4, batch_first=True), _Gated(dim, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [embed(part) for embed, part in zip(self.embed, x.split(1, -1), strict=True)]
        chosen = self.choose(torch.cat(parts, -1)).softmax(-1)
        each = torch.stack([gated(part) for gated, part in zip(self.each, parts, strict=True)], -1)
        y = (each * chosen.unsqueeze(-2)).sum(-1)
        y = y + self.lstm(y)[0]
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.after(y))


def temporal_fusion() -> Case:
    """Linear layers of one feature, gates, an LSTM, attention."""
    return Case(_Fusion(), series(32, 6))


class _MambaBlock(nn.Module):
    """A recurrence over time in Python. Source: Gu and Dao 2024, "Mamba"."""

    def __init__(self, dim: int, states: int = 8) -> None:
        super().__init__()
        self.states, self.rank = states, 4
        self.norm, self.inside, self.outside = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)
        self.conv = nn.Conv1d(2 * dim, 2 * dim, 4, padding=3, groups=2 * dim)
        self.select, self.step = nn.Linear(2 * dim, self.rank + 2 * states), nn.Linear(self.rank, 2 * dim)
        self.decay = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(2 * dim, 1))
        self.skip = nn.Parameter(torch.ones(2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        signal, gate = self.inside(self.norm(x)).chunk(2, -1)
        signal = F.silu(self.conv(signal.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        step, write, read = self.select(signal).split([self.rank, self.states, self.states], -1)
        step = F.softplus(self.step(step))
        keep = torch.exp(-step.unsqueeze(-1) * self.decay.exp())
        add = (step * signal).unsqueeze(-1) * write.unsqueeze(2)
        state, found = torch.zeros_like(add[:, 0]), []
        for time in range(x.shape[1]):
            state = keep[:, time] * state + add[:, time]
            found.append((state * read[:, time].unsqueeze(1)).sum(-1))
        return x + self.outside((torch.stack(found, 1) + signal * self.skip) * F.silu(gate))


def mamba() -> Case:
    """A selective state space."""
    return Case(nn.Sequential(nn.Linear(8, 48), _MambaBlock(48), _MambaBlock(48), nn.Linear(48, 8)), series(16, 8))
