"""Usual names of attributes in networks, which tell whether an attribute is likely to widen."""

HEAD_COUNT_NAMES = (
    "num_heads",
    "n_heads",
    "n_head",
    "nhead",
    "nheads",
    "heads",
    "num_attention_heads",
)
"""Names of attributes that hold a number of attention heads, which the search widens first."""

SCALE_NAMES = ("scale", "scaling", "softmax_scale", "scale_factor", "qk_scale")
"""Names of attributes that hold the factor of products of queries and keys."""

NO_WIDTH_NAMES = (
    *("window_size", "kernel_size", "patch_size", "stride", "img_size"),
    *("head_dim", "groups"),
)
"""Names of attributes that hold no width; the search first tries to leave them unchanged."""
