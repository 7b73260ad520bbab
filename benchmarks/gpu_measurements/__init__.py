"""The measurements of `benchmarks/gpu.py`: functions that take a Bench and return numbers by name."""
