"""The performance harness: a request generator, its summaries and reports, and a runner for grids of experiments.

It talks to servers over HTTP only and imports nothing from `inlaid`, so every figure is one a user could get.
"""
