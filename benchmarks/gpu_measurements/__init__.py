"""What `benchmarks/gpu.py` measures: a function each, which takes a Bench and returns numbers by name."""
