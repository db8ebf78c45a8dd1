"""Where rows are made: launchers by name, a kind of the registry like any other."""
