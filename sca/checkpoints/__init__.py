"""Checkpoints: what was trained, in one folder that always loads; also those of the published system."""
