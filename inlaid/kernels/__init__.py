"""Kernels. `spec` is the specification, in plain loops; the others are held to it by tests, and faster."""
