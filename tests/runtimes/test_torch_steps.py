"""A program as a list of calls in JSON: written, read, and refused where it is something else."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from lightning_quant.errors import ArtifactError, ExportError
from lightning_quant.runtimes._torch_program import Program
from lightning_quant.runtimes._torch_steps import TENSOR, read_steps, simplify, tensors_of, unread_inputs, write_steps

ATEN = torch.ops.aten
DESCRIBED = {"inputs": [{"name": "x"}, {"name": "y"}], "outputs": [{"name": "output"}], "engine": None}


def graph_of() -> fx.GraphModule:
    """Return the larger of `2 * x + shift` and minus infinity, with a dropout, unfilled memory and a counter."""
    root = nn.Module()
    root.register_buffer("calls", torch.zeros(()))
    root.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]))
    graph = fx.Graph()
    x, _ = graph.placeholder("x"), graph.placeholder("y")
    dropped = graph.call_function(ATEN.dropout.default, (x, 0.5, False))
    doubled = graph.call_function(ATEN.mul.Tensor, (dropped, 2))
    shifted = graph.call_function(ATEN.add.Tensor, (doubled, graph.get_attr("shift")))
    empty = graph.call_function(ATEN.empty.memory_format, ([3],), {"dtype": torch.float32})
    added = graph.call_function(ATEN.add.Tensor, (shifted, empty))
    calls = graph.get_attr("calls")
    graph.call_function(ATEN.copy_.default, (calls, graph.call_function(ATEN.add.Tensor, (calls, 1))))
    graph.output([graph.call_function(ATEN.clamp_min.default, (added, float("-inf")))])
    module = fx.GraphModule(root, graph)
    simplify(module.graph)
    return module


def test_a_program_that_is_read_again_computes_the_same(tmp_path: Path) -> None:
    module, path = graph_of(), tmp_path / "steps.json.gz"
    write_steps(module, path, DESCRIBED, ["x", "y"])
    program = read_steps(path)
    tensors = {TENSOR + name: tensor for name, tensor in tensors_of(module).items()}
    x = torch.randn(4, 3)

    assert [step["call"] for step in program["steps"]].count("aten.dropout.default") == 0
    assert set(tensors) == {TENSOR + "shift"}
    assert "aten.zeros.default" in [step["call"] for step in program["steps"]]
    (result,) = Program(program, tensors, path, once=True)([x, x])
    assert torch.equal(result, 2 * x + torch.tensor([1.0, 2.0, 3.0]))
    assert unread_inputs(program) == {"y"}


def test_what_no_operator_of_the_list_does_is_named(tmp_path: Path) -> None:
    graph = fx.Graph()
    graph.output([graph.call_function(ATEN.fill_.Scalar, (graph.placeholder("x"), 0.0))])
    with pytest.raises(ExportError, match="that only compute, but it calls"):
        write_steps(fx.GraphModule(nn.Module(), graph), tmp_path / "steps.json.gz", DESCRIBED, ["x"])


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 99}', b'{"format": 1}'])
def test_files_that_are_no_program_of_this_version_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "steps.json.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ArtifactError, match="to be a program of steps"):
        read_steps(path)


def test_numbers_that_json_has_none_for_are_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "steps.json.gz"
    write_steps(graph_of(), path, DESCRIBED, ["x", "y"])
    program = json.loads(gzip.decompress(path.read_bytes()))
    assert program["steps"][-1]["args"][1] == {"float": "-inf"}
