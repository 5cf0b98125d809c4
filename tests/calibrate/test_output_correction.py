"""The mean of every layer's output is restored, as far as calls agree on it."""

import torch
from uneven_chains import climbed

from lightning_quant.calibrate.output_correction import correct_outputs, shrunk_mean
from lightning_quant.calls.calls import Call


def test_output_correction_restores_the_mean_of_every_layer() -> None:
    _, prepared, calls = climbed(())
    # What one call says is believed.
    calls = [Call((torch.cat([args[0] for args, _ in calls]),), {})]
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


def test_errors_that_calls_agree_on_are_corrected_and_chance_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.ones(8, dtype=torch.float64)
    common = torch.randn(64, generator=generator).double()
    noise = torch.randn(200, 8, 64, generator=generator).double()

    agreed = shrunk_mean(common + 0.01 * noise[0], sizes)
    torch.testing.assert_close(agreed, common, rtol=0.02, atol=0.02)
    for power in (0.0, 0.1, 0.5):
        plain = (power * common + noise).mean(1)
        shrunk = torch.stack([shrunk_mean(errors, sizes) for errors in power * common + noise])
        errors = [(each - power * common).square().sum(1) for each in (plain, shrunk)]
        assert errors[1].mean() < 0.75 * errors[0].mean()


def test_a_short_last_call_counts_for_what_it_holds() -> None:
    errors = torch.tensor([[1.0, 2.0], [1.0, 2.0], [9.0, -9.0]]).double()
    expected = torch.tensor([1.0, 2.0]).double()
    torch.testing.assert_close(
        shrunk_mean(errors, torch.tensor([32.0, 32.0, 0.01]).double()), expected, rtol=1e-2, atol=0
    )
