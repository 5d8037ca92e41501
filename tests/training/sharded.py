"""``kvpatch`` with FSDP2 on CPUs: run by torchrun, with the environment of ``accelerate launch``.

accelerate makes FSDP of processes on GPUs and leaves those on CPUs without it, silently. What
shards, trains and saves is torch's, and does the same over gloo: here accelerate is told that it
may.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

import convert.training.loop as loop
from convert.cli import main

_made = AcceleratorState.__init__


def _sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    _made(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        assert self.distributed_type == DistributedType.MULTI_CPU, "accelerate shards on CPUs now"
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class _Sharded(loop.Training):
    """Patches the models as on GPUs, and says how many modules are gathered one by one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, fused=lambda device: True)

    def run(self) -> loop.Outcome:
        model: nn.Module = self.model
        units = sum(isinstance(module, FSDPModule) for module in model.modules())
        self._say(f"{units} sharded units")
        dtypes = set[torch.dtype]()
        model.register_forward_hook(lambda *given: dtypes.update(loss.dtype for loss in given[2]))
        outcome = super().run()
        self._say(f"losses in {dtypes}")
        return outcome


if __name__ == "__main__":
    AcceleratorState.__init__ = _sharding  # type: ignore[method-assign]
    import convert.training.run as run

    run.Training = _Sharded  # type: ignore[misc]
    main()
