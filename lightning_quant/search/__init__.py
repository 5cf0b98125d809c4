"""The cheapest model that keeps the limits: tried, ranked, bisected, and proven on the exported file."""
