"""The five papers' claims beside what is measured here; `python -m perf.papers` writes the page."""
