"""Reports of runs: what they logged, what their networks predict, and pages that show it."""
