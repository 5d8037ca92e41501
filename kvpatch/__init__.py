"""Runtime side of kvpatch: what a converted model needs when it is loaded and run.

Importing it registers the model classes of converted checkpoints, and the attention function
``kvpatch_triton``, with transformers, at once or when that is imported; it imports neither
transformers nor torch.
"""

from typing import TYPE_CHECKING, Any

from kvpatch.registration import register_with_transformers

if TYPE_CHECKING:
    from kvpatch.patching import Report, patch, patched, unpatch

__version__ = "0.1.0"

__all__ = ["Report", "__version__", "patch", "patched", "unpatch"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvpatch import patching  # noqa: PLC0415 - it imports torch

    return getattr(patching, name)
