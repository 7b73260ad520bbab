"""linalign on Ray Serve: HTTP in front, engines behind, each with GPUs of its own (docs/scaling.md)."""
