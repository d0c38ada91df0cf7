"""Building blocks of random networks, see `catalogue`."""
