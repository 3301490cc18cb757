"""The owner's ledger: what was spent on each data set, how it composes, and what it says no to."""
