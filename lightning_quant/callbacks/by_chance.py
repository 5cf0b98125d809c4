"""Metrics of a validation that draws random numbers: how far they are apart by chance alone."""

from collections.abc import Mapping, Sequence


def in_words(values: Sequence[Mapping[str, float]]) -> str:
    """Say between which values the float model's metrics lie with several seeds.

    Args:
        values: of the float model, one mapping for each seed.
    """
    known = [name for name in values[0] if all(name in one for one in values)]
    spans = {name: (min(one[name] for one in values), max(one[name] for one in values)) for name in known}
    apart = [f"{name} from {low:.4g} to {high:.4g}" for name, (low, high) in spans.items() if high > low]
    seeds = "validation draws random numbers, the same ones for float, simulated and artifact"
    if not apart:
        return f"{seeds}; float metrics are the same with {len(values)} seeds"
    return f"{seeds}: with {len(values)} seeds float alone has {', '.join(apart)}"
