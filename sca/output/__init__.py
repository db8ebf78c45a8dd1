"""Captions written to and read from files, and the viewer."""
