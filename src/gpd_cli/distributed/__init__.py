"""Several processes, and what ends or interrupts them."""
