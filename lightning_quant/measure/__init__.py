"""Metrics on any model, noise, agreement with the record, time, memory, and which layers cost accuracy."""
