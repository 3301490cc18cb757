"""The coordinator: round loop, the Grid that it drives, run directory, resume."""
