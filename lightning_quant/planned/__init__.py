"""A module with its captured call and a plan: sizes, batches, ways without a graph or a program."""
