"""linalign eval: measures the effect and the cost of principles and ratios, through the HTTP API."""
