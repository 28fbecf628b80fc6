"""HTTP: the OpenAI routes, adapter administration, metrics and the console."""
