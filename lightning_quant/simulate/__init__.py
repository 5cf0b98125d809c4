"""Prepared modules and what their graphs run, and how far an artifact is from that."""
