"""DP-SGD: batches, per-example gradients by two engines, and the models that either of them can train."""
