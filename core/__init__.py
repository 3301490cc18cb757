"""What all of bract stands on: keys, flat parameters, exact sums, Flower's internals, errors."""
