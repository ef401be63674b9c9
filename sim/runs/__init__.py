"""A run's life, from its configuration to its report: federate, single, paper, sweep, resume."""
