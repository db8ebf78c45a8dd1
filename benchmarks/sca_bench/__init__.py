"""Benchmark combinations of components."""
