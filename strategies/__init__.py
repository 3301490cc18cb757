"""Aggregation rules: server half and client half of each in one file."""
