"""Keys and values on their way from the layer that makes them to the layers that read them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

__all__ = ["SharedKV", "current_kv", "empty_readers", "handing_down"]


class SharedKV(UserDict[int, tuple[Tensor, Tensor]]):
    """Keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] of one forward pass, by producing layer.

    All tokens the layer can see are in, past ones too. Of latent attention it holds the latents
    [B, 1, T, R] and the rotary keys [B, 1, T, Dr] in their place. Not a ``dict``, because FSDP2
    rebuilds the dicts among a module's arguments, and what a layer stores would stay in its own
    copy.
    """

    def read(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values of a producing layer, on the device of the reader.

        Raises:
            RuntimeError: If that layer did not run before in this forward pass.
        """
        if layer not in self:
            raise RuntimeError(
                f"layer {layer} has not run in this forward pass, but a later layer reads its keys "
                "and values: run the layers of the model in order, through the model"
            )
        if self[layer][0].device != device:
            self.to(device)
        return self[layer]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SharedKV:
        """Move everything to a device in place; accelerate calls it between devices."""
        for layer, (keys, values) in self.items():
            self[layer] = (
                keys.to(device, non_blocking=non_blocking),
                values.to(device, non_blocking=non_blocking),
            )
        return self


_CURRENT: ContextVar[SharedKV | None] = ContextVar("kvpatch_shared_kv", default=None)


def current_kv() -> SharedKV | None:
    """The container of the forward pass around the caller, where keyword arguments are dropped."""
    return _CURRENT.get()


@contextmanager
def handing_down(shared: SharedKV) -> Iterator[None]:
    """Make ``shared`` the current container: of this thread, and nested passes get back theirs."""
    token = _CURRENT.set(shared)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class EmptyLayer(cache_utils.CacheLayerMixin):  # type: ignore[misc]
    """Cache layer of a layer that reads another's cache: holds nothing and stays so.

    For transformers before 5.23, which cannot crop a layer that was never written to.
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Never called: a reader stores nothing."""
        raise RuntimeError("this layer reads the cache of another and has none of its own")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes as if nothing were cached."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """No token is held."""
        return 0

    def get_max_length(self) -> int:
        """Unlimited."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to crop."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing to repeat."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Nothing to select."""


_EMPTY: type[Any] = getattr(cache_utils, "DummyLayer", EmptyLayer)


def empty_readers(cache: Any, modes: list[str | None]) -> None:
    """Put empty layers into a cache wherever a layer reads another's.

    A cache made for the config has them already in transformers 5.23; one made without, or by an
    older version, has layers that nothing is ever written to, and that it could not crop.

    Args:
        cache: Any cache, or None.
        modes: ``kv_sharing_modes`` of the config.
    """
    if cache is None:
        return
    for layer, (held, mode) in enumerate(zip(cache.layers, modes, strict=False)):
        if mode == "reuse" and not isinstance(held, _EMPTY):
            cache.layers[layer] = _EMPTY()
