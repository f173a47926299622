"""Measurements of the product against what users would run instead; `python -m benchmarks --help`."""
