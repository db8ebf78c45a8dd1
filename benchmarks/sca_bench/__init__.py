"""Comparing combinations of parts."""
