"""Many virtual clients on this machine."""
