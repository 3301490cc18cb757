"""The audit of a program: the plan of an experiment is run, and what the kernel did is held against what is claimed."""
