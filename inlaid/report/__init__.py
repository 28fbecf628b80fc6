"""Reports of experiments: provenance, tables and plots. Used by `inlaid.sim`, `eval` and `perf`; host only."""
