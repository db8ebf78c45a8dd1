"""Shared reading and writing of files: validators, bounded readers, atomic writes, journals and run folders."""
