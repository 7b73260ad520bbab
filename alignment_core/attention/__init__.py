"""Attention over the paged KV cache: one file per backend.

A backend is a function with the signature of transformers' AttentionInterface and one more keyword argument, `paged`:
the PagedBatch of the running step.
"""
