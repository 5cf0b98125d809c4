"""What was measured, in sections that each tell their subject in words, numbers, pictures and data."""
