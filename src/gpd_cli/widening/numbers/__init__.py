"""Find the numbers (sizes, numbers of heads) that a network's code needs in the wide network.

`arithmetic` has integers that remember how they were computed, `calls` finds the numbers that a
call needs for a wide tensor, and `solve` finds the attributes that these numbers come from.
"""
