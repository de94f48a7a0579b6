"""What makes every published figure; `python -m benchmarks.NAME --help` explains each script."""
