"""Tables of training runs: training the runs, their records, the page of results and figures."""
