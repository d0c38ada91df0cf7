"""Test of runs that are killed, or whose disks fail: they must lose nothing and resume exactly."""
