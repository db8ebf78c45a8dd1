"""Web demo: `sca demo`."""
