"""The audit of record-level privacy: what the kernel of each site does with its records."""
