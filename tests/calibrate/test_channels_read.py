"""What readers of tensors see of each channel, over all calls."""

import torch
from torch import nn
from uneven_chains import prepared_chain

from lightning_quant.calibrate.channels_read import activation_extremes, activation_maxima
from lightning_quant.calibrate.groups import scaling_groups


def test_extremes_are_those_of_all_calls_channel_by_channel() -> None:
    model, prepared, calls = prepared_chain(nn.ReLU)
    (group,) = [group for group in scaling_groups(prepared) if group.consumers == (":layers.3",)]
    with torch.no_grad():
        seen = model.layers[:3](torch.cat([args[0] for args, _ in calls]))

    torch.testing.assert_close(activation_maxima(prepared, [group], calls)[group], seen.amax((0, 2, 3)))
    ends = activation_extremes(prepared, [group], calls)[group]
    torch.testing.assert_close(ends, (seen.amin((0, 2, 3)), seen.amax((0, 2, 3))))
    assert activation_maxima(prepared, [], calls) == {}
