"""Arithmetic with its sources: grids, rounding, folding, integers, noise. It knows no graph and no module's plan."""
