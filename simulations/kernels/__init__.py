"""How virtual clients train: many at once where the model allows it, tested against the sequential kernel."""
