"""What is learned: model, data, loss and metrics, one file per task."""
