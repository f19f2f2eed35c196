"""Benchmarks: every operator and module against torch's own. Run with `python -m benchmarks`."""
