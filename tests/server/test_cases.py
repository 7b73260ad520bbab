"""Requests that real clients send, each with what is right: the cases of the issue "Every client as it is"."""
