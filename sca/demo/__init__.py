"""The web demo: `sca demo`."""
