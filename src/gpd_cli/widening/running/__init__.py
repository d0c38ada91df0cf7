"""How a network is run to be looked at: in float64, with random statistics, errors located."""
