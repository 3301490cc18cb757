"""A real site: the owner's policy and ledger in front of every message, and what answers it."""
