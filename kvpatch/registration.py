"""Make transformers know the model_types of converted models, and our attention function.

Nothing heavy is imported before it is needed: transformers not before the user imports it, and the
classes of a family not before a checkpoint of that family is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from kvpatch.models.families_kvpatch import FAMILIES, Family

__all__ = ["register", "register_with_transformers"]

_AUTO = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register now what is known to modules that are imported, the rest as soon as they are."""
    for module, action in ((_AUTO, register), (_MODELS, _register_attention)):
        if module in sys.modules:
            action()
        else:
            sys.meta_path.insert(0, _AfterImport(module, action))


def _register_attention() -> None:
    # it registers itself when it is ready: it may be what imports transformers, and be half made
    importlib.import_module("kvpatch.attention.interface")


def register() -> None:
    """Register a stand-in config for every family."""
    auto = sys.modules[_AUTO]
    for family in FAMILIES.values():
        name = family.converted_type
        auto.AutoConfig.register(name, _stand_in(family), exist_ok=True)


def _stand_in(family: Family) -> type[Any]:
    """What the auto classes hold for a family until it is used for the first time.

    It has the two ways in which they make a config, and puts the real classes in its place then.
    """

    def real() -> Any:
        transformers = importlib.import_module("transformers")
        config, model, causal_lm = (
            getattr(importlib.import_module(f"kvpatch.models.{module}"), name)
            for module, name in (where.split(".") for where in family.auto_map.values())
        )
        transformers.AutoConfig.register(family.converted_type, config, exist_ok=True)
        transformers.AutoModel.register(config, model, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
        return config

    class StandIn:
        model_type = family.converted_type

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return real()(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return real().from_dict(*args, **kwargs)

    return StandIn


class _AfterImport(MetaPathFinder):
    """Waits for a module to be imported, and acts once it has been.

    Args:
        module: Its full name.
        action: What to do then.
    """

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module = module
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the awaited module as if this finder did not exist, with its loader wrapped."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _act_after(spec.loader, self.action)
        return spec


def _act_after(loader: Loader, action: Callable[[], None]) -> None:
    execute = loader.exec_module

    def execute_and_act(module: ModuleType) -> None:
        execute(module)
        action()

    loader.exec_module = execute_and_act  # type: ignore[method-assign]
