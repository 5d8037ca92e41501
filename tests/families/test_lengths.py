"""Which models go past the positions that their config states, by running them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvpatch  # noqa: F401 - the classes of results are known by it
from convert.lengths import check_length, position_limit
from kvpatch.errors import UsageError
from tests.families.stock import Checkpoints, make
from tests.families.tiny import MODELS, family, settings
from tests.faults.running import cli
from tests.helpers import load_folder

_LIMIT = 64  # positions of the tiny models
_STATED = {"max_position_embeddings": 99}
_FAMILIES = sorted({family(name) for name in MODELS})
_METHODS = {"gqa": ("--kv-heads", "2"), "mqa": (), "mla": ("--kv-budget", "50%")}
_RESULTS = (  # in classes of others, of their own, with latents
    *(("gpt2", "gqa"), ("gpt2", "mqa"), ("gpt2", "mla"), ("opt", "mqa"), ("gptj", "gqa")),
    *(("gptj", "mla"), ("codegen", "mla"), ("mpt", "mqa"), ("falcon", "gqa"), ("llama", "mla")),
)


def _runs(model: Any, tokens: int) -> bool:
    """Whether a model gives logits for so many tokens."""
    ids = torch.randint(3, 97, (1, tokens), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            return bool(model(ids, use_cache=False).logits.isfinite().all())
    except (IndexError, RuntimeError):
        return False


def _allowed(config: dict[str, Any], tokens: int) -> bool:
    """Whether so many tokens are not refused; where they are past the limit, that must be said."""
    try:
        warnings = check_length(config, tokens, name="it", asked=f"--context {tokens}")
    except UsageError:
        return False
    said = f"--context {tokens} is more than the {_LIMIT} tokens that it was made for; "
    states = position_limit(config) == _LIMIT
    assert [warning.startswith(said) for warning in warnings] == [True] * (tokens > _LIMIT) * states
    return True


@pytest.mark.parametrize("name", _FAMILIES)
def test_stock_models_run_as_far_as_is_said(name: str) -> None:
    model = make(name, settings(name))
    config = model.config.to_dict()
    for tokens in (_LIMIT, _LIMIT + 1, 3 * _LIMIT):
        assert _runs(model, tokens) == _allowed(config, tokens), tokens


@pytest.mark.parametrize(("name", "method"), _RESULTS)
def test_results_run_as_far_as_is_said(
    name: str, method: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    arguments = [method, str(checkpoint(name)), str(tmp_path / "out"), *_METHODS[method], "-q"]
    assert cli(arguments).code == 0
    model = load_folder(tmp_path / "out")
    for tokens in (_LIMIT, _LIMIT + 1):
        assert _runs(model, tokens) == _allowed(model.config.to_dict(), tokens), tokens


@pytest.mark.parametrize(
    ("config", "limit", "ends"),
    [
        ({"model_type": "gpt2"}, 1024, True),
        ({"model_type": "gpt_neo"}, 2048, True),
        ({"model_type": "kvpatch_gpt2", "n_positions": 99, "kv_lora_rank": 8}, 99, True),
        (
            {"model_type": "deepseek_v3", "kv_lora_rank": 8, "max_position_embeddings": 99},
            99,
            False,
        ),
        ({"model_type": "unheard-of", "max_position_embeddings": 99}, 99, True),
        ({"model_type": "unheard-of"}, 2048, False),
        ({"model_type": "bloom"}, 2048, False),
        ({"model_type": "bloom", "seq_length": 99}, 99, False),
    ],
)
def test_what_configs_say_and_do_not_say(config: dict[str, Any], limit: int, ends: bool) -> None:
    assert position_limit(config) == limit
    check_length(config, limit, name="it", asked="--context")
    if ends:
        with pytest.raises(UsageError, match="positions of it"):
            check_length(config, limit + 1, name="it", asked="--context")
    else:
        assert len(check_length(config, 3000, name="it", asked="--context")) == (limit == 99)
