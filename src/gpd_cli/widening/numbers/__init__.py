"""Arithmetic on the numbers in a network's code: the values that fit the copies."""
