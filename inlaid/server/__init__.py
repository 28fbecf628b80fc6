"""HTTP: the OpenAI routes, adapter administration and metrics."""
