"""Algorithms that raise the accuracy of a calibrated model: one file per paper, each a function on a `Prepared`."""
