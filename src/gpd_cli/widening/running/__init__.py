"""Running a network under observation: in float64, with random statistics, errors located."""
