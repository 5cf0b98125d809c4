"""The rounded weights of a graph, all of them when a run begins, with scales from one operation for all.

Nothing is kept from one run to the next but constants: optimizers and weight averaging write into weights through
`.data`, which leaves no trace that would tell.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.numerics import kernels
from lightning_quant.numerics.fake_quantize import channel_extremes, fake_quantize_weight, pass_gradient, weight_scale
from lightning_quant.numerics.folding import Norm, Statistics, fold, gain_and_shift, statistics
from lightning_quant.numerics.learned_steps import LearnedSteps, quantize_with_learned_step
from lightning_quant.ranges.grids import Grids
from lightning_quant.simulate.quantizers import Quantizers
from lightning_quant.surgery.routing import has_hooks


@dataclass(frozen=True)
class Place:
    """Where an operator's weight is found in a module, and the grid it is rounded to.

    Attributes:
        identity: of the operator.
        owner: names on the way to the module that has the weight, and its name there.
        bias: the same for the bias; empty when there is none.
        norm: names of the statistics of the fused BatchNorm.
        quant_max: highest integer of the weight's grid.
        row: of the edge that the operator reads, in `Grids`.
    """

    identity: str
    weight: tuple[str, ...]
    bias: tuple[str, ...]
    norm: Norm | None
    quant_max: int
    row: int


@dataclass(frozen=True)
class _Site:
    """A weight as it is now, with what its scale follows from."""

    place: Place
    weight: Tensor
    bias: Tensor | None
    norm: Statistics | None


class RoundedWeights:
    """Rounds the weights of one graph."""

    def __init__(self, quantizers: Quantizers, operators: tuple[str, ...]) -> None:
        self.places = []
        self._num_operators = len(operators)
        for identity in operators:
            operator = quantizers.operators[identity]
            weight, bias = (tuple(name.split(".")) if name else () for name in (operator.weight, operator.bias))
            row = quantizers.ranges.rows.get(operator.reads[0])
            constants = quantizers.islands[operator.path].constants
            if row is not None and not operator.affine and not {operator.weight, operator.bias} & constants.keys():
                quant_max = quantizers.weight_quant_max(identity)
                self.places.append(Place(identity, weight, bias, operator.norm, quant_max, row))
        self._constants: dict[object, Tensor] = {}
        self._rows: tuple[object, Any] | None = None

    def rounded(self, module: nn.Module, grids: Grids, learned: LearnedSteps | None) -> dict[str, Tensor]:
        """Return operator to rounded weight, for parameters of layers that nothing changes when they are called.

        Args:
            module: that the graph was traced from.
            grids: of all edges.
            learned: the weights' scales where they are trained.
        """
        sites = [site for place in self.places if (site := _site(module, place, grids.scales.device)) is not None]
        if not sites:
            return {}
        if torch.compiler.is_compiling():
            # Compilers join the passes themselves, and would take what is kept here for new each time.
            return {
                site.place.identity: fake_quantize_weight(site.weight, _scale(site, grids), _computed_in(site.weight))
                for site in sites
            }
        weights, identities = [site.weight for site in sites], [site.place.identity for site in sites]
        if learned is not None:
            steps = [learned.step_of(s.place.identity, s.weight, s.place.quant_max) for s in sites]
            maximum = torch.cat([step.detach() for step in steps]) * self._quant_max(sites)
            scales = self._scales(sites, maximum, grids).split(_sizes(sites))
            by_step = zip(sites, steps, scales, strict=True)
            return {site.place.identity: _with_learned_step(site, step, scale) for site, step, scale in by_step}
        if kernels.are_rows(weights):
            rows = self._rows_of(weights)
            given = rows.rounded(self._scales(sites, rows.maxima(), grids), _computed_in(weights[0]))
            return {i: pass_gradient(w, r) for i, w, r in zip(identities, weights, given, strict=True)}
        highest, lowest = zip(*map(channel_extremes, weights), strict=True)
        maximum = torch.maximum(torch.cat(highest), -torch.cat(lowest)).float()
        scales = self._scales(sites, maximum, grids).split(_sizes(sites))
        by_scale = zip(identities, weights, scales, strict=True)
        return {i: fake_quantize_weight(weight, scale, _computed_in(weight)) for i, weight, scale in by_scale}

    def are_plain(self, module: nn.Module) -> bool:
        """Tell whether all weights are parameters that nothing changes when their layers are called."""
        return len(self.places) == self._num_operators and all(
            _site(module, place, None) is not None for place in self.places
        )

    @torch.no_grad()
    def _scales(self, sites: list[_Site], maximum: Tensor, grids: Grids) -> Tensor:
        """Return the scales of all weights before folding, one for each channel, the same as `fold` gives."""
        quant_max = self._quant_max(sites)
        if all(site.norm is None and site.bias is None for site in sites):
            return weight_scale(maximum, quant_max)
        gain, bias = self._gain_and_bias(sites, _sizes(sites))
        rows = self._spread([site.place.row for site in sites], _sizes(sites), grids.scales.device)
        return weight_scale(maximum, quant_max, gain=gain, bias=bias, input_scale=grids.scales[rows])

    def _quant_max(self, sites: list[_Site]) -> Tensor:
        return self._spread([float(site.place.quant_max) for site in sites], _sizes(sites), sites[0].weight.device)

    def _rows_of(self, weights: list[Tensor]) -> Any:
        """Return the list of all rows; kept as long as the weights lie where they lay."""
        places = tuple((weight.data_ptr(), weight.shape, weight.stride(), weight.dtype) for weight in weights)
        if self._rows is None or self._rows[0] != places:
            self._rows = places, kernels.rows_of(weights)
        return self._rows[1]

    def _gain_and_bias(self, sites: list[_Site], sizes: list[int]) -> tuple[Tensor | None, Tensor]:
        device = sites[0].weight.device

        def joined(values: list[Tensor | None], absent: float) -> Tensor:
            # What is absent is filled in with what changes nothing.
            parts = zip(values, sizes, strict=True)
            return torch.cat([self._spread([absent], [n], device) if v is None else v for v, n in parts]).float()

        bias = joined([site.bias for site in sites], 0.0)
        norms = [site.norm for site in sites]
        if all(norm is None for norm in norms):
            return None, bias
        mean, variance, gamma, beta = (
            joined([None if norm is None else getattr(norm, name) for norm in norms], absent)
            for name, absent in (("mean", 0.0), ("variance", 1.0), ("weight", 1.0), ("bias", 0.0))
        )
        eps = self._spread([0.0 if norm is None else norm.eps for norm in norms], sizes, device)
        gain, shift = gain_and_shift(mean, variance, eps, gamma, bias)
        return gain, shift + beta

    def _spread(self, values: list[float] | list[int], sizes: list[int], device: torch.device) -> Tensor:
        """Return one value for each channel of several layers; kept, since a copy to a device takes time."""
        key = (tuple(values), tuple(sizes), type(values[0]), device)
        if key not in self._constants:
            spread = [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]
            dtype = torch.float32 if isinstance(values[0], float) else torch.int64
            self._constants[key] = torch.tensor(spread, dtype=dtype, device=device)
        return self._constants[key]


def _sizes(sites: list[_Site]) -> list[int]:
    return [len(site.weight) for site in sites]


def _with_learned_step(site: _Site, step: Tensor, scale: Tensor) -> Tensor:
    # A scale that was stretched for the sake of the bias is not the learned one, and passes no gradient to it.
    chosen = torch.where(scale > step * 1.0001, scale, step)
    return quantize_with_learned_step(site.weight, chosen, site.place.quant_max)


def _scale(site: _Site, grids: Grids) -> Tensor:
    input_scale = grids.scales[site.place.row]
    return fold(site.weight, site.bias, site.norm, input_scale, site.place.quant_max).unfolded_scale


def _site(module: nn.Module, place: Place, device: torch.device | None) -> _Site | None:
    owner = _module_at(module, place.weight[:-1])
    weight = owner._parameters.get(place.weight[-1])
    if weight is None or has_hooks(owner) or not weight.is_floating_point():
        return None
    if device is not None and weight.device != device:
        return None
    bias = getattr(_module_at(module, place.bias[:-1]), place.bias[-1]) if place.bias else None
    return _Site(place, weight, None if bias is None else bias.detach(), statistics(module, place.norm))


def _module_at(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _computed_in(weight: Tensor) -> torch.dtype:
    """Return the dtype that autocast will compute the layer in: rounding to it at once saves a pass."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype
