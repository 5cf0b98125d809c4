import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lightning_quant.numerics import decomposed
from lightning_quant.numerics.decomposed import define_operators


@pytest.mark.parametrize("zero_points", [None, torch.tensor([0, 3, -2, 5])])
def test_own_operators_compute_what_those_of_pytorch_do(zero_points: torch.Tensor | None) -> None:
    define_operators()
    theirs = torch.ops.quantized_decomposed
    x = torch.randn(3, 4, 5)
    grid = (0.03, 100, 0, 255, torch.uint8)
    integers = decomposed.quantize_per_tensor(x, *grid)
    assert torch.equal(integers, theirs.quantize_per_tensor(x, *grid))
    assert torch.equal(decomposed.dequantize_per_tensor(integers, *grid), theirs.dequantize_per_tensor(integers, *grid))
    points = torch.zeros(4, dtype=torch.int64) if zero_points is None else zero_points
    channels = (torch.tensor([0.03, 0.02, 0.1, 0.05]), points, 1, -128, 127, torch.int8)
    integers = decomposed.quantize_per_channel(x, *channels)
    assert torch.equal(integers, theirs.quantize_per_channel(x, *channels))
    values = decomposed.dequantize_per_channel(integers, *channels)
    assert torch.equal(values, theirs.dequantize_per_channel(integers, *channels))


_WITHOUT = """
    import sys
    sys.modules["torch.ao.quantization.fx._decomposed"] = None
    import torch
    import lightning_quant as lq
    from torch import nn

    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    artifact = lq.quantize(net, calibration_data=[torch.randn(2, 1, 8, 8)] * 4, output_dir=sys.argv[1])
    assert artifact.report["operators"]["QLinearConv"] == 1, artifact.report["operators"]
    assert artifact.report["parity"]["worst_share"] == 1.0
"""


def test_a_pytorch_without_them_exports_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_WITHOUT), str(tmp_path / "artifact")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_loads_those_of_pytorch_later_is_not_in_the_way() -> None:
    code = """
        from lightning_quant.numerics.decomposed import define_operators
        define_operators()
        import torch.ao.quantization.fx._decomposed
        import torch._inductor.lowering
        import torch
        assert torch.ops.quantized_decomposed.quantize_per_tensor.tensor
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
