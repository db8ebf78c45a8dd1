"""Captions over HTTP: `sca serve`, and the scheduler behind it that answers many clients together."""
