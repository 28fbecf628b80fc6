"""Seeded generators of the demo's twelve tasks, their committed splits, and fetchers of real data sets."""
