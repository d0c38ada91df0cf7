"""The search for a width plan.

`find` is the entry. It records a run of the student on a probe batch; then `widen` runs a copy of
the student that is widened on the way, module by module, once or several times. In such a run:

- `widen_layers` widens each layer just before it runs, by the index maps of its input.
- `containers` handles the other modules with a `forward` of their own, and chooses what to try with
  each of them; `attempt` runs a container's code, and `follow` adjusts the numbers (sizes, splits,
  heads) in the calls of this code to the wider tensors.
- `widening_run` has what these parts share, `state` what has been decided so far, and
  `wide_network` the copy as it is so far.

Some properties of a container have to be guessed. `choices` finds these `variables`, `options` the
ways in which each may widen; `trial_order` orders the guesses, and `trials` counts those that were
wrong and limits their number. `shared_layouts`, `cut_layouts` and `output_factors` derive what
guessing would not find. `unsupported` refuses students that cannot be expanded.
"""
