"""The same scheduler on a virtual clock and a fitted cost model."""
