"""q* as the rollout of trainers, each an extra of its own that is imported by name: `qstar.integrations.trl`, `.verl`."""
