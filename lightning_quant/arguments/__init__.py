"""Arguments as users write them: names, choices, checks, and the reading of files that somebody else may have made."""
