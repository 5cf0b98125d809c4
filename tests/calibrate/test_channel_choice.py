"""Factors of channels are chosen by the error behind the layers that read them."""

import torch
from torch import nn
from uneven_chains import Normalized, images, prepared_chain

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.channel_choice import choose_channels
from lightning_quant.calibrate.fit import output_snr
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import Recipe


def test_uneven_channels_are_evened_out_and_export() -> None:
    _, prepared, calls = prepared_chain(nn.ReLU6)
    x = images(32, seed=7)
    before = output_snr(prepared, [((x,), {})])
    assert choose_channels(prepared, scaling_groups(prepared), calls) == 2
    recalibrate(prepared, calls)
    assert output_snr(prepared, [((x,), {})]) > before + 3
    assert check_agreement(prepared, convert(prepared), (x,), {}) > 40


def test_even_channels_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        # The hidden channels have one and the same range, and are read by one and the same magnitude.
        model[0].weight.copy_(torch.eye(16))
        model[0].bias.zero_()
        model[2].weight.fill_(0.5)
    x = torch.rand(512, 16, generator=torch.Generator().manual_seed(1))
    x[::2] = 1.0
    prepared = prepare(model, (x[:8],), recipe=Recipe(), observer="mse")
    calibrate(prepared, steps_of(prepared, list(x.split(128))))
    assert choose_channels(prepared, scaling_groups(prepared), [((part,), {}) for part in x.split(128)]) == 0
    assert not prepared.channels


def test_what_a_float_operator_writes_is_scaled_in_nets_with_layer_norm_alone() -> None:
    torch.manual_seed(0)
    model = Normalized().eval()
    with torch.no_grad():
        for layer in (model.one, model.other):
            layer.weight[:, [3, 20]] /= 40
    calls = [((x,), {}) for x in torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).split(16)]
    prepared = prepare(model, *calls[0], recipe=Recipe(), observer="mse")
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    before = output_snr(prepared, calls)
    assert choose_channels(prepared, scaling_groups(prepared), calls) == 1
    recalibrate(prepared, calls)
    assert output_snr(prepared, calls) > before + 5
    loud = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 2, 8)
    plain = prepare(nn.Sequential(nn.Linear(8, 4)).eval(), (loud,), recipe=Recipe(), observer="mse")
    calibrate(plain, steps_of(plain, list(loud.split(16))))
    assert choose_channels(plain, scaling_groups(plain), [((part,), {}) for part in loud.split(16)]) == 0
