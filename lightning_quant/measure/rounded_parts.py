"""What of a prepared module is rounded for the sake of which operator: its weight, and tensors."""

from collections.abc import Collection

from lightning_quant.simulate.prepared import Prepared


def name_of(prepared: Prepared, identity: str) -> str:
    """Return an operator's qualified name, as plans and overrides call it."""
    return prepared.operators[identity].name


def own_parts(prepared: Prepared, identity: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return an operator's weight, and the edges that are its own: its output and what float operators hand it."""
    operator = prepared.operators[identity]
    weight = frozenset({identity}) if operator.weight else frozenset()
    output = {operator.writes} if operator.quantized_output else set()
    return weight, frozenset(output | read_from_float(prepared, identity))


def read_from_float(prepared: Prepared, identity: str) -> set[str]:
    """Return the input edges that no operator writes: they are quantized for the sake of those that read them."""
    written = {operator.writes for operator in prepared.operators.values() if operator.quantized_output}
    inputs = set(prepared.operators[identity].reads)
    return {edge for edge in inputs & set(prepared.ranges.observers) if edge not in written}


def touched_edges(prepared: Prepared, identity: str) -> set[str]:
    """Return the edges that an operator reads or writes: kernels of integers need all of them rounded."""
    operator = prepared.operators[identity]
    return {*operator.reads, *([operator.writes] if operator.quantized_output else [])} & set(prepared.ranges.edges)


def all_but(prepared: Prepared, names: Collection[str] = ()) -> frozenset[str]:
    """Return what is still rounded with these operators in float, for `Simulation.quantizing_only`.

    A tensor is, as long as another operator reads or writes it; one that only passes another on, a max-pool's result
    say, is as long as one of its group is.
    """
    edges, left = set(prepared.ranges.edges), [i for i in prepared.operators if name_of(prepared, i) not in names]
    touched = set().union(*(touched_edges(prepared, identity) for identity in left))
    known = set().union(*(touched_edges(prepared, identity) for identity in prepared.operators))
    sources = {prepared.ranges.source(edge) for edge in touched}
    passing = {edge for edge in edges - known if prepared.ranges.source(edge) in sources}
    return frozenset(touched | passing | {identity for identity in left if prepared.operators[identity].weight})
