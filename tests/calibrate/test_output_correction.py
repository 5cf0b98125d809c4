"""The mean of every layer's output is restored."""

import torch
from uneven_chains import climbed

from lightning_quant.calibrate.output_correction import correct_outputs


def test_output_correction_restores_the_mean_of_every_layer() -> None:
    _, prepared, calls = climbed(())
    from lightning_quant.calibrate.lockstep import lockstep
    from lightning_quant.calibrate.rescale import along_rows, folded_layer

    assert correct_outputs(prepared, calls) == 3
    differences = []

    def visit(site) -> None:
        layer, folded = folded_layer(prepared, site.identity), prepared.folded(site.identity)
        weight = prepared.weight_integers(site.identity, folded)
        weight = weight * along_rows(folded.scale, weight)
        exact = torch.cat([site.compute(x, layer.weight, layer.bias) for x in site.float_inputs])
        actual = torch.cat([site.compute(x, weight, folded.bias) for x in site.quantized_inputs])
        differences.append((exact.mean((0, 2, 3)) - actual.mean((0, 2, 3))).abs().max())

    lockstep(prepared, calls, visit)
    assert len(differences) == 3
    assert max(differences) < 1e-4
