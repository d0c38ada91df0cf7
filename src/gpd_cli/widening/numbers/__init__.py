"""Arithmetic on the numbers that a network's code computes with: what follows the copies."""
