"""Speed: the joint training step against plain steps of its two networks."""
