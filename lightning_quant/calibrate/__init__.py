"""Ranges from calls, and whatever a recipe does for accuracy, a file for each paper."""
