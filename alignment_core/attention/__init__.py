"""Attention over the paged KV cache: one file per backend.

A backend is a function in the shape of transformers' AttentionInterface that takes, besides what
every model passes, the keyword `paged`: the PagedBatch of the running step.
"""
