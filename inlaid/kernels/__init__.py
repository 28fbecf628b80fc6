"""Kernels: `reference` is the specification in plain torch; the others are twins of it, only faster."""
