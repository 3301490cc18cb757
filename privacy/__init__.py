"""Guarantees: clipping, noise, DP-SGD, accounting, accounted releases, and what they promise in words."""
