"""The HTTP server: OpenAI's protocol over alignment_core's engine. Knows no tensors."""
