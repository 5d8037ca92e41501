"""Runtime side of kvpatch: what a converted model needs when it is loaded and run."""

__version__ = "0.1.0"

__all__ = ["__version__"]
