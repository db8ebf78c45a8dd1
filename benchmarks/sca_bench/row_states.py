"""States of a row."""

ROW_STATES = {
    "done": "made, evaluated and measured",
    "impossible": "its parts do not fit together",
    "skipped": "it is predicted not to fit into memory",
    "out-of-memory": "it did not fit into memory",
    "timed-out": "it took longer than it was given",
    "crashed": "its process ended by a signal of its own making, or without a word",
    "not-finite": "a weight or a loss is not a number",
    "import-error": "something that it needs cannot be imported",
    "failed": "anything else",
}
