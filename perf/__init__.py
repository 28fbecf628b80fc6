"""The performance harness: a request generator, its summaries and reports, and a runner for grids of experiments.

It talks to servers over HTTP only, so every figure is one that a user could get.
"""
