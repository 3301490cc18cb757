"""What a person looks at: the report page, its plots, live progress, and the closing summary of a run."""
