"""Training of the runs of a table, their records, and the page of results made from them."""
