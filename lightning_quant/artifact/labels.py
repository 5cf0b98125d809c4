"""The labels of a classifier's classes, where a model or its data carries them."""

from typing import Any

# torchvision's data sets have `classes`; models and datamodules of users one of the others; transformers `id2label`.
_ATTRIBUTES = ("classes", "class_names", "labels")


def class_labels(*owners: Any) -> tuple[str, ...] | None:
    """Return the labels that the first of these objects to have some carries, in the order of the scores, or None."""
    for owner in owners:
        for name in _ATTRIBUTES:
            labels = attribute_of(owner, name)
            if isinstance(labels, list | tuple) and labels and all(isinstance(label, str) for label in labels):
                return tuple(map(_printable, labels))
        by_index = attribute_of(attribute_of(owner, "config"), "id2label")
        if isinstance(by_index, dict) and by_index and set(by_index) == set(range(len(by_index))):
            return tuple(_printable(str(by_index[index])) for index in range(len(by_index)))
    return None


def attribute_of(owner: Any, name: str) -> Any:
    """Return what a user's object has by a name, for a caption; None where it has nothing, or what it has raises."""
    try:
        return getattr(owner, name, None)
    # The user's own property: of what is not there any more when fit has ended, say.
    except Exception:
        return None


def _printable(label: str) -> str:
    """Return a label as every file format takes it: in one line, without control characters and halves of others."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(label.split()))
