"""How a network's width plan is found, by running it."""
