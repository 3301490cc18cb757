"""What trains one client for one round: kernels, each of which executes a LocalTraining."""
