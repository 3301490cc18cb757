"""The commands: each file parses its arguments, calls what does the work, and prints; none holds logic."""
