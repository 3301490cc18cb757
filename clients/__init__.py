"""The data owner: Flower ClientApp, local training, the gate."""
