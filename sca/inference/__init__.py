"""Inference: masks and captions for images and prompts."""
