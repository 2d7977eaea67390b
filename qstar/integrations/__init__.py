"""q* as the rollout of trainers: `qstar.integrations.trl` and `.verl`, each an extra that is imported by its name."""
