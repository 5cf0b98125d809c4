"""A sample as a reader recognizes it: a small picture of an image, the text of tokens."""

import base64
import struct
import zlib
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_quant.artifact.labels import attribute_of

# Pixels of a thumbnail's longer side, and letters of a text.
_PIXELS, _LETTERS = 96, 400


def tokenizer_of(*owners: Any) -> Any:
    """Return what makes text of tokens, of the first of these objects that has a `tokenizer`; None without one."""
    for owner in owners:
        if (tokenizer := attribute_of(owner, "tokenizer")) is not None:
            return tokenizer
    return None


def image_of(one: list[Tensor]) -> str:
    """Return a PNG in base64 of the first input that is an image of one or three channels; empty without one.

    Args:
        one: the inputs of a single sample.
    """
    image = next((t[0] for t in one if t.dim() == 4 and t.is_floating_point() and t.shape[1] in (1, 3)), None)
    if image is None or min(image.shape[1:]) < 4:
        return ""
    image = image.float()
    if max(image.shape[1:]) > _PIXELS:
        factor = _PIXELS / max(image.shape[1:])
        image = F.interpolate(image[None], scale_factor=factor, mode="area")[0]
    low, high = image.amin(), image.amax()
    pixels = ((image - low) / (high - low).clamp(min=1e-12) * 255).round().byte()
    return base64.b64encode(png(pixels)).decode()


def png(pixels: Tensor) -> bytes:
    """Return a PNG file (ISO/IEC 15948) of bytes `(channels, height, width)`, one or three channels."""
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels)
    # In front of each row the number of its filter: none.
    data = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], 1).contiguous().numpy().tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def text_of(one: list[Tensor], tokenizer: Any) -> str:
    """Return the text of the first input that is tokens; their numbers without a tokenizer, empty without tokens.

    Args:
        one: the inputs of a single sample.
        tokenizer: has `decode`, from ids to text.
    """
    tokens = next((t[0] for t in one if t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    if tokens is None:
        return ""
    ids = tokens.tolist()
    try:
        # Padding and the like, which tokenizers of transformers know of, tell a reader nothing.
        special = set(getattr(tokenizer, "all_special_ids", ()))
        words = [token for token in ids if token not in special]
        text = " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(words))
    # The user's own code, for a caption: ids that it does not know, say.
    except Exception:
        text = " ".join(map(str, ids))
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
