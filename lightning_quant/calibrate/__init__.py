"""Stage 4: ranges from calls, and whatever a recipe does for accuracy, a file for each paper."""
