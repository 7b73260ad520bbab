"""What a GPU holds of a model and a load, and how fast it may be: arithmetic, nothing runs. See docs/scaling.md."""
