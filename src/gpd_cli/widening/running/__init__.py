"""Tools to run a network for observation: in float64, with random weights, with errors located."""
