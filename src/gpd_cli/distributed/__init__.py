"""Several processes: launchers, seeds, synchronized norms, and signals that stop a run."""
