"""Tables of training runs: what they gain, as records, a page and figures."""
