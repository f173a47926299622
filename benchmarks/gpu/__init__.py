"""What only a GPU can show: `python -m benchmarks gpu`. Made JPEGs, random weights, no network; `--device cpu --size toy` tries it."""
