"""linalign on Ray Serve: HTTP in front, engines behind, each with its own GPUs (docs/scaling.md)."""
