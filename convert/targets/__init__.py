"""Targets: what a converted layer is emitted as."""
