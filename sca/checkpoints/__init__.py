"""Checkpoints: save, load, inspect and publish models, in the native and in the original SCA layout."""
