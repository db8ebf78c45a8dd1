"""Shared reading and writing of files: validators, bounded readers."""
