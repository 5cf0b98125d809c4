"""Weights of few bits in eight: the same plan with finer grids of its weights, and nothing else otherwise."""

from lightning_quant.graph.table import matches
from lightning_quant.simulate.prepared import Prepared

# The highest integer of eight bits, of grids that are widened to them, and of what files store in half a byte where
# their runtime can. Grids of seven bits are chosen for kernels that eight would saturate.
_EIGHT_BITS, _SIX_BITS, _FOUR_BITS = 127, 31, 7


def in_eight_bits(prepared: Prepared) -> Prepared:
    """Return the same plan with weights of eight bits, rounded to nearest, where they have few and nobody said so.

    What steps for accuracy and training made of weights of few bits is not for those of eight.
    """
    modules, said = dict(prepared.root.named_modules()), prepared.recipe.overrides
    wide = prepared.bound_to(prepared.root)
    wide.layers, wide.channels, wide.bias_corrections, wide.learned_steps = {}, {}, {}, None
    wide.weight_quant_maxima = {
        identity: _EIGHT_BITS
        for identity, operator in prepared.operators.items()
        if operator.weight
        and prepared.weight_quant_max(identity) <= _SIX_BITS
        and not any(matches(pattern, operator.name, type(modules.get(operator.name)).__name__) for pattern in said)
    }
    return wide


def bytes_of_value(prepared: Prepared, identity: str) -> float:
    """Return what one value of a weight takes in a file that stores four bits in four; others store eight."""
    return 0.5 if prepared.weight_quant_max(identity) <= _FOUR_BITS else 1.0
