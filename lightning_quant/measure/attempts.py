"""What is measured for a report alone: where that fails, the artifact stays, and the report says what it lacks."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_quant.errors import QuantizationError


@contextmanager
def noting(missing: list[str], what: str, *, alone: bool = True) -> Iterator[None]:
    """Let a run go on where a block fails that measures something, and note what is missing and why.

    Args:
        missing: gets a clause, for the report's warnings.
        what: is missing then, in words.
        alone: whether no other process waits for this one in the block; where some do, errors of others end the run.
    """
    try:
        yield
    # The user's validation, metrics and modules, run once more, raise what they like: what was trained is not lost.
    except Exception as error:
        if not alone and not isinstance(error, QuantizationError):
            raise
        missing.append(f"{what} missing: {error if isinstance(error, QuantizationError) else repr(error)}".rstrip("."))
