"""Names of what a run directory holds, beside its metrics (`logging`) and checkpoints."""

CONFIG_FILE = "config.yaml"
"""The resolved config."""
ENVIRONMENT_FILE = "environment.json"
"""Versions, commit and hosts of the process that ran last."""
PLAN_FILE = "plan.txt"
"""What `oprd plan` says of the run."""
