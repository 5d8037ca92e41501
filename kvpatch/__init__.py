"""Runtime side of kvpatch: what a converted model needs when it is loaded and run.

Importing it registers the model classes of converted checkpoints with the auto classes of
transformers, at once or when transformers is imported; it imports neither transformers nor torch.
"""

from kvpatch.registration import register_with_transformers

__version__ = "0.1.0"

__all__ = ["__version__"]

register_with_transformers()
