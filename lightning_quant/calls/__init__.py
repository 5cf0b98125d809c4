"""Calls as data: which tensors go in under which names, what comes out, and what batches are made of."""
