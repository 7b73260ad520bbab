"""ASGI middleware, in the order of `server/app.py`, and the `Exchange` that records one request for it."""
