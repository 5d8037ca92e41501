"""Uptraining: what a conversion lost is learnt back from the source."""
