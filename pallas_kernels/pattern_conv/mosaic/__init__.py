"""Kernels for Hopper GPUs and later, on batches that lie beside the channels (HWNC)."""
