"""Default of the search for regions by text, apart from it so that commands list it without slow imports."""

DEFAULT_THRESHOLD = 0.6  # minimum score of a match in `sca find`, the server and the demo
