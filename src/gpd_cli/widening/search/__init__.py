"""The search for a width plan, from its entry to its parts.

`find` records a run of the student, and lets `widen` run a copy that widens on the way, once or
more often. In such a run, `widen_layers` widens each layer just before it runs, and `containers`
chooses what to attempt with each container; `attempt` then runs the container's code, whose calls
`follow` makes with numbers that fit the copies. What they share is in `run`, what has been decided
so far in `state`, and the network so far in `wide_network`.

What to guess for a container: `choices` finds its `variables`, each with its `options`;
`trial_order` puts guesses for them in order, and `trials` says when there have been enough.
`shared_layouts`, `cut_layouts` and `multiples` find what guesses would not.
"""
