"""Sharded training with FSDP2, on two processes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import kvpatch
from kvpatch.models import family_of
from tests.families import tiny
from tests.families.stock import random_ids
from tests.kvpatch.stacks import converted, pairs, stock_model

# keyword arguments reach the attention of the first two, and not of the others; one is patched
_MODELS = (("llama", False), ("llama", True), ("stablelm", False), ("gptj", False))


def _compare(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    for name, patched in _MODELS:
        model = converted(name, stock_model(name), 2, pairs(name)).float()
        ids = random_ids(model)
        model(ids, labels=ids, use_cache=False).loss.backward()
        want = {key: weight.grad.clone() for key, weight in model.named_parameters()}
        model.zero_grad()
        if patched:
            kvpatch.patch(model)
        prefix = family_of(tiny.family(name)).attention_prefix
        for layer in range(4):
            path = prefix.format(layer=layer).rpartition(f".{layer}.")[0] + f".{layer}"
            fully_shard(model.get_submodule(path), mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        for key, weight in model.named_parameters():
            torch.testing.assert_close(weight.grad.full_tensor(), want[key], rtol=0, atol=1e-6)
    dist.barrier()  # threads of a process that ends while the other still sends would abort it
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_sharded_gradients_are_those_of_one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_compare, (str(Path(folder) / "store"),), nprocs=2)
