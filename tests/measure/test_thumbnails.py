"""Pictures and texts of single samples."""

import base64
import io

import pytest
import torch

from lightning_quant.measure.thumbnails import image_of, png, text_of, tokenizer_of


def test_thumbnails_are_the_images() -> None:
    image = torch.rand(1, 3, 10, 12)
    image[0, 0, 0, 0], image[0, 1, 0, 0] = 0, 1
    pixels = pytest.importorskip("matplotlib.image").imread(io.BytesIO(base64.b64decode(image_of([image]))))

    assert torch.allclose(torch.from_numpy(pixels).permute(2, 0, 1), image[0], atol=0.003)
    gray = torch.arange(20, dtype=torch.uint8).view(1, 4, 5)
    assert (255 * pytest.importorskip("matplotlib.image").imread(io.BytesIO(png(gray)))).round().tolist() == gray[
        0
    ].tolist()
    assert image_of([torch.rand(1, 3, 500, 200)])
    assert len(base64.b64decode(image_of([torch.rand(1, 3, 500, 200)]))) < 96 * 96 * 4
    assert image_of([torch.rand(1, 7, 9, 9), torch.rand(1, 8)]) == ""


def test_tokens_are_text_where_something_decodes_them() -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return " ".join("word"[:i] for i in ids)

    class Padding(Words):
        all_special_ids = (1,)

    class Broken:
        def decode(self, ids: list[int]) -> str:
            raise KeyError(ids[0])

    tokens = [torch.rand(1, 3), torch.tensor([[1, 2, 4]])]
    assert text_of(tokens, Words()) == "w wo word"
    assert text_of(tokens, Padding()) == "wo word"
    assert text_of(tokens, None) == text_of(tokens, Broken()) == "1 2 4"
    assert len(text_of([torch.ones(1, 5000, dtype=torch.long)], None)) == 400
    assert text_of(tokens[:1], Words()) == ""


def test_a_tokenizer_that_is_not_there_any_more_is_none() -> None:
    class Gone:
        @property
        def tokenizer(self) -> None:
            raise RuntimeError("not set up")

    class Has:
        tokenizer = "words"

    assert tokenizer_of(Gone(), None, object()) is None
    assert tokenizer_of(Gone(), Has()) == "words"
