"""The engine. It knows tensors and no HTTP. docs/architecture.md says which package does what."""
