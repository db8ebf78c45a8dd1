"""Where work is done that is too much for one process: launchers by name, a kind of the registry like any other."""
