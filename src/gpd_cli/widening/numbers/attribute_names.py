"""Names by which networks usually call their attributes, and what they say about widths."""

HEAD_COUNT_NAMES = ("num_heads", "n_heads", "nhead", "heads", "num_attention_heads")
"""Names of attributes that hold a number of attention heads: tried first."""

SCALE_NAMES = ("scale", "scaling", "softmax_scale", "scale_factor", "qk_scale")
"""Names of attributes that hold the factor of attention's products."""

NO_WIDTH_NAMES = (
    *("window_size", "kernel_size", "patch_size", "stride", "img_size"),
    *("head_dim", "groups"),
)
"""Names of attributes that hold no width, whatever their value: tried unchanged first."""
