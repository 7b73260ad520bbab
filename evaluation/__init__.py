"""What the ratio does and what it costs, measured through a server's own API: `linalign eval`."""
