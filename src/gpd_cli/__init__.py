"""Gap Preserving Distillation (Guo et al., ICLR 2025, arXiv 2410.04140)."""
