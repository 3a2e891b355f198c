"""From scores to masks: which taps and which kernels stay."""

from clicktrain_jax.selection.select import check_patterns, num_patterns_of, select_layers, select_masks

__all__ = ["check_patterns", "num_patterns_of", "select_layers", "select_masks"]
