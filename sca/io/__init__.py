"""File reading and writing: validation, bounded readers, atomic writes, journals and run folders."""
