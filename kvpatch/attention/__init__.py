"""Fused attention for the models of transformers: under its name there, or patched into them."""
