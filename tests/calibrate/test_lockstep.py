"""Operators are visited one by one with what they read in all calls."""

import torch
from torch import nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calls.calls import Call
from lightning_quant.export.prepare import prepare


def test_sites_see_all_calls_in_float_and_rounded_and_later_ones_see_changes() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(32, 6)
    prepared = prepare(model, (x[:8],), observer="min_max")
    calibrate(prepared, steps_of(prepared, list(x.split(8))))
    calls = [Call((part,)) for part in x.split(8)]
    seen: dict[str, Site] = {}

    def visit(site: Site) -> None:
        seen[site.identity] = site
        layer = model.get_submodule(site.identity[1:])
        exact = torch.cat([site.compute(part, layer.weight, layer.bias) for part in site.float_inputs])
        torch.testing.assert_close(exact, layer(torch.cat(site.float_inputs)))
        if site.identity == ":0":
            prepared.bias_corrections[":0"] = torch.full((4,), 100.0)

    lockstep(prepared, calls, visit)

    assert list(seen) == [":0", ":2"]
    assert [len(site.float_inputs) for site in seen.values()] == [4, 4]
    torch.testing.assert_close(torch.cat(seen[":0"].float_inputs), x)
    torch.testing.assert_close(torch.cat(seen[":2"].float_inputs), model[:2](x))
    # The correction of the first layer drove all that it writes to the end of its range.
    assert len(torch.cat(seen[":2"].quantized_inputs).unique()) == 1
    assert prepared.phase != "frozen"


def test_the_quantized_model_runs_only_when_it_is_wanted() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)).eval(), torch.randn(8, 6)
    prepared = prepare(model, (x,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    seen: list[Site] = []
    lockstep(prepared, [Call((x,))], seen.append, quantized=False)

    assert [(len(site.float_inputs), site.quantized_inputs) for site in seen] == [(1, [])]
