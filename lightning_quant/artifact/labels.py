"""The labels of a classifier's classes, where a model or its data carries them."""

from typing import Any

# torchvision's data sets have `classes`; models and datamodules of users one of the others; transformers `id2label`.
_ATTRIBUTES = ("classes", "class_names", "labels")


def class_labels(*owners: Any) -> tuple[str, ...] | None:
    """Return the labels that the first of these objects to have some carries, in the order of the scores, or None."""
    for owner in owners:
        for name in _ATTRIBUTES:
            labels = getattr(owner, name, None)
            if isinstance(labels, list | tuple) and labels and all(isinstance(label, str) for label in labels):
                return tuple(labels)
        by_index = getattr(getattr(owner, "config", None), "id2label", None)
        if isinstance(by_index, dict) and sorted(by_index) == list(range(len(by_index))) and by_index:
            return tuple(str(by_index[index]) for index in range(len(by_index)))
    return None
