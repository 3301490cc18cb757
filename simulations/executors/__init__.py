"""Where virtual clients run: in this process, in worker processes, on a Ray cluster."""
