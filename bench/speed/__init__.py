"""Benchmark of the joint training step against plain training steps of its two networks."""
