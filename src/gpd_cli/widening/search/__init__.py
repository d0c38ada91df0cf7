"""The search for a width plan: solved where the arithmetic allows, tried where it does not."""
