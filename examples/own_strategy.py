"""An own strategy in a few lines: bract simulate examples/own_strategy.toml"""

from bract.core.parameters import arrays_of, record_of
from bract.strategies.fedavg import FedAvg


class Damped(FedAvg):
    """Move only a share of the way to the clients' mean."""

    def __init__(self, *, share: float = 0.5):
        super().__init__()
        self.share = share

    def configure_train(self, server_round, arrays, config, grid):
        self.current = arrays_of(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_total(self, server_round, total):
        mean, metrics = super().aggregate_total(server_round, total)
        if mean is None:
            return None, metrics
        step = {name: old + self.share * (arrays_of(mean)[name] - old) for name, old in self.current.items()}
        return record_of(step), metrics
