"""The Hub: sources are fetched from it, results pushed to it. Only this room uses the network."""

from __future__ import annotations

from convert.hub.source import (
    Source,
    fetch_config,
    fetch_source,
    fetched,
    opened_source,
    user_path,
)

__all__ = ["Source", "fetch_config", "fetch_source", "fetched", "opened_source", "user_path"]
