"""Which sizes vary in a file, what is given up where they cannot, and what a call may leave out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant import load
from lightning_quant.errors import ExportError, FixedSizesError, QuantizationError
from lightning_quant.export.export import export, trial_export
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.planned.parts import check_takes, in_parts
from lightning_quant.planned.sizes import chosen_shapes, notes_of_sizes

RECIPE = "int8_weight_only"


class Counting(nn.Module):
    """Asks Python for the number of samples in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "len":
            return y.reshape(len(x), 2, -1).mean(2)
        if self.how == "int":
            return y.reshape(int(x.shape[0]), 2, -1).mean(2)
        return torch.stack([row.reshape(2, -1).mean(1) for row in y])


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 2)

    def forward(self, frames: Tensor) -> Tensor:
        state = frames.new_zeros(frames.shape[0], 8)
        for step in range(frames.shape[1]):
            state = self.cell(frames[:, step], state)
        return self.head(state)


class WithTarget(nn.Module):
    """Takes a target that only training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, batch: dict[str, Tensor], target: Tensor | None = None) -> Tensor:
        y = self.layer(batch["x"])
        return y + target.mean() if self.training and target is not None else y


class Staged:
    """A batch that carries its stage beside its tensors, as projects register them."""

    def __init__(self, x: Tensor, stage: str) -> None:
        self.x, self.stage = x, stage


pytree.register_pytree_node(
    Staged, lambda b: ([b.x], b.stage), lambda leaves, stage: Staged(leaves[0], stage), serialized_type_name="Staged"
)


class ByStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, batch: Staged) -> Tensor:
        y = self.layer(batch.x)
        return y if batch.stage == "train" else F.relu(y)


def exported(model: nn.Module, folder: Path, *args: Any, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    prepared = quantize_layers(model.eval(), args, recipe=RECIPE, runtime=options.pop("runtime", "torch"))
    for call in options.pop("others", ()):
        prepared.note_sizes(call, {})
    export(prepared, folder, **options)
    return prepared, load(folder, threads=1)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_len_of_a_tensor_is_a_size_that_varies(runtime: str, tmp_path: Path) -> None:
    model = Counting("len")
    prepared, loaded = exported(model, tmp_path, torch.randn(4, 8), runtime=runtime)

    x = torch.randn(7, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), atol=0.1, rtol=0.1)
    assert notes_of_sizes(prepared) == ()
    assert [info.shape[0] for info in (*loaded.signature.inputs, *loaded.signature.outputs)] == ["batch", "batch"]


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("how", ["int", "rows"])
def test_a_batch_that_python_fixes_stays_and_the_line_is_named(how: str, runtime: str, tmp_path: Path) -> None:
    model = Counting(how)
    prepared, loaded = exported(model, tmp_path, torch.randn(4, 8), runtime=runtime)

    (note,) = notes_of_sizes(prepared)
    assert "dimension 0 of `x` is 4" in note
    assert "test_sizes.py" in note
    assert ("int(x.shape[0])" if how == "int" else "for row in y") in note
    with pytest.raises(QuantizationError, match="shape"):
        loaded(torch.randn(3, 8))
    # Metrics come from any number of samples all the same: they do not depend on each other.
    x = torch.randn(9, 8)
    with torch.no_grad():
        torch.testing.assert_close(in_parts(loaded, prepared)(x), model(x), atol=0.1, rtol=0.1)


def test_a_loop_over_time_keeps_the_captured_length_and_a_free_batch(tmp_path: Path) -> None:
    calls = [(torch.randn(4, 5, 4),), (torch.randn(4, 7, 4),)]
    prepared, loaded = exported(Loop(), tmp_path, *calls[0], others=calls[1:])

    assert loaded.signature.inputs[0].shape == ("batch", 5, 4)
    (note,) = notes_of_sizes(prepared)
    assert "dimension 1 of `frames` is 5" in note
    with pytest.raises(FixedSizesError, match=r"dimension 1 of `frames` 5.*but got 7"):
        check_takes(prepared, calls[1], {})
    check_takes(prepared, (torch.randn(3, 5, 4),), {})


@pytest.mark.parametrize("chosen", ["static", {}])
def test_static_sizes_are_the_captured_ones(chosen: Any, tmp_path: Path) -> None:
    prepared, loaded = exported(Counting("len"), tmp_path, torch.randn(4, 8), dynamic_shapes=chosen)

    assert loaded.signature.inputs[0].shape == (4, 8)
    assert notes_of_sizes(prepared) == ()


@pytest.mark.parametrize(("error", "is_given_up"), [(0.3, True), (1e-3, False)])
def test_a_runtime_that_computes_another_thing_for_any_batch_gets_the_captured_one(
    error: float, is_given_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenVINO does for a recurrence behind convolutions. It must not be taken for noise of quantization."""
    from lightning_quant.runtimes.onnxruntime import OnnxRuntimeModule

    right = OnnxRuntimeModule.run

    def wrong(loaded: OnnxRuntimeModule, tensors: list[Tensor]) -> list[Tensor]:
        varies = isinstance(loaded.signature.inputs[0].shape[0], str)
        noise = torch.Generator().manual_seed(0)
        return [y + varies * error * torch.randn(y.shape, generator=noise) for y in right(loaded, tensors)]

    monkeypatch.setattr(OnnxRuntimeModule, "run", wrong)
    prepared, loaded = exported(Counting("len"), tmp_path, torch.randn(4, 8), runtime="onnxruntime")
    assert (loaded.signature.inputs[0].shape == (4, 8)) is is_given_up
    assert any("dB" in note for note in notes_of_sizes(prepared)) is is_given_up


def test_what_no_choice_of_shapes_is_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"`dynamic_shapes` to be 'static'.*but got 'dynamic'"):
        chosen_shapes("dynamic")  # type: ignore[arg-type]


def test_chosen_dimensions_that_cannot_vary_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="frames"):
        exported(Loop(), tmp_path, torch.randn(4, 5, 4), dynamic_shapes={"frames": {1: "time"}})


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_inputs_that_the_file_does_not_read_may_be_left_out(runtime: str, tmp_path: Path) -> None:
    model, x = WithTarget(), torch.randn(4, 8)
    _, loaded = exported(model, tmp_path, {"x": x, "y": torch.randn(4)}, torch.randn(4), runtime=runtime)

    assert loaded.signature.optional == ("batch_y", "target")
    expected = loaded({"x": x, "y": torch.zeros(4)}, torch.zeros(4))
    for args in (({"x": x},), ({"x": x}, None), ({"x": x, "y": torch.zeros(4)},)):
        assert torch.equal(loaded(*args), expected)
    with pytest.raises(QuantizationError, match="batch_x"):
        loaded({"y": torch.zeros(4)})


def test_what_a_batch_carries_beside_its_tensors_is_part_of_the_call(tmp_path: Path) -> None:
    model, x = ByStage(), torch.randn(4, 8)
    _, loaded = exported(model, tmp_path, Staged(x, "validate"))

    with torch.no_grad():
        torch.testing.assert_close(loaded(Staged(x, "validate")), model(Staged(x, "validate")), atol=0.1, rtol=0.1)
    with pytest.raises(QuantizationError, match=r"Staged\('validate'\).*but got Staged\('train'\)"):
        loaded(Staged(x, "train"))


def test_the_trial_finds_what_the_end_would(tmp_path: Path) -> None:
    prepared = quantize_layers(Counting("int").eval(), (torch.randn(4, 8),), recipe=RECIPE)
    trial_export(prepared)

    assert notes_of_sizes(prepared)
    tried = len(prepared.refused)
    export(prepared, tmp_path)
    assert len(prepared.refused) == tried


@dataclass
class Pair:
    x: Tensor
    scale: Tensor


def test_own_classes_without_anything_beside_tensors_may_be_called_with_others(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, pair: Any) -> Tensor:
            return self.layer(pair["x"] if isinstance(pair, dict) else pair.x)

    x = torch.randn(4, 8)
    _, loaded = exported(Net(), tmp_path, Pair(x, torch.ones(4)))
    assert loaded({"x": x}).shape == (4, 3)
