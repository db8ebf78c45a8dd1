"""Evaluate captioners: `predictions` records model outputs, `metrics` score the records, `evaluate` does both."""
