"""Reports on runs, which show their logs and the predictions of their networks."""
