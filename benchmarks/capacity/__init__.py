"""Estimates how much load a GPU can hold for a model, and how fast, by arithmetic. See docs/scaling.md."""
