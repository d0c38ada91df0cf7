"""Runs that are killed and whose disks fail: nothing is lost, and what goes on is the same run."""
