"""What follows calibration of a model with a graph."""

import torch
from prepared_graphs import evaluated
from torch import nn

from lightning_quant.export.prepare import prepare
from lightning_quant.graph.qdq import is_static

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def test_a_trial_has_ranges_of_the_captured_call_and_the_model_none() -> None:
    model = prepare(net(), (X,), observer="mse")
    trial = model.for_trial()

    assert trial.ranges.observers[":input"].range() == (X.min(), X.max())
    assert all(observer.low is None for observer in model.ranges.observers.values())
    assert not model.is_attached


def test_a_trial_of_a_call_without_numbers_has_made_up_ranges() -> None:
    model = prepare(net(), (X.clone(),))
    model.captured.tensors[0].fill_(torch.nan)
    assert all(observer.range() == (0.0, 1.0) for observer in model.for_trial().ranges.observers.values())


def test_what_is_converted_computes_what_was_simulated() -> None:
    model = evaluated(net(), X)
    converted, result = model.converted(static_sizes=False)
    with torch.no_grad(), model.attached("frozen"):
        simulated = model.root(X)

    assert is_static(converted)
    torch.testing.assert_close(result, simulated, atol=1e-6, rtol=0)
    assert model.evaluated_layers == ("0", "2")
