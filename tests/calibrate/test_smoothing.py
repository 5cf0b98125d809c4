"""Differences between channels move into the weights that read them."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from uneven_chains import Normalized, images, prepared_chain

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calibrate.smoothing import smooth, smoothing_factor
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe.recipe import Recipe


def test_scaling_makes_uneven_channels_accurate_and_exports() -> None:
    model, prepared, calls = prepared_chain(nn.ReLU6)
    x = images(32, seed=7)

    def quality() -> float:
        with torch.no_grad(), prepared.attached("frozen"):
            simulated = model(x)
        return signal_to_noise(model(x), simulated)

    before = quality()
    smooth(prepared, [g for g in scaling_groups(prepared) if not g.from_float], calls)
    recalibrate(prepared, calls)
    assert quality() > before + 3
    converted = convert(prepared)
    assert check_agreement(prepared, converted, (x,), {}) > 40


def test_smoothing_factor_follows_the_paper() -> None:
    activation, weight = torch.tensor([16.0, 4.0, 0.0]), torch.tensor([1.0, 4.0, 1.0])
    # sqrt(16 / 1) = 4 and sqrt(4 / 4) = 1, over the largest; a dead channel stays.
    torch.testing.assert_close(smoothing_factor(activation, weight, 0.5), torch.tensor([1.0, 0.25, 1.0]))
    torch.testing.assert_close(smoothing_factor(activation, weight, 1.0), torch.tensor([1.0, 0.25, 1.0]))


def test_migration_leaves_the_float_function() -> None:
    torch.manual_seed(0)
    model = Normalized().eval()
    calls = [((x,), {}) for x in torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).split(16)]
    prepared = prepare(model, *calls[0], recipe=Recipe(), observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    (group,) = [group for group in scaling_groups(prepared) if group.normalized]
    assert smooth(prepared, [group], calls) == 1
    assert float((prepared.channels[group.edges[0]].factor - 1).abs().max()) > 0.5
    read = prepared.on_grid(group.edges[0], model.norm(calls[0][0][0]))
    for name in ("one", "other"):
        layer, exact = prepared.layers[f":{name}"], getattr(model, name)(model.norm(calls[0][0][0]))
        torch.testing.assert_close(F.linear(read, layer.weight, layer.bias), exact, atol=1e-5, rtol=1e-5)
