"""A run's directory: what is in it, who may write to it, and what it says of where the run runs."""
