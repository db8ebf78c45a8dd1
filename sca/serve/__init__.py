"""Captions over HTTP: `sca serve`, and the engine behind it that answers many clients together."""
