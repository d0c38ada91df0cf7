"""The training losses: labels, the dynamic teacher's logits, and distillation from static teachers.

`objective` has the terms of the joint loss that need no static teacher, `distillation` the terms
that do. `methods` has one distillation method per file, and `features` reads feature maps and
embeddings out of the networks for them.
"""
