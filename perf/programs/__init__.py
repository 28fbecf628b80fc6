"""Prompt programs measured: `versus.py` compares ways to run the same calls, `steps.py` times the engine's steps."""
