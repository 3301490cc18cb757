"""The audit of client-level privacy: what the server, or each client, does with whole updates."""
