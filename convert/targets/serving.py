"""What inference servers make of a DeepSeek checkpoint, judged by its config.json.

Read off their code: ``deepseek_v2.py`` and ``MLACommonBackend`` of vLLM, ``deepseek_v2.py`` of
SGLang and ``deepseek2.cpp`` of llama.cpp. Their attention has no biases and their latent norm takes
``rms_norm_eps``; any kind of rotary positions but the default one they read as YaRN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.targets.inert import EPSILON

__all__ = ["SERVERS", "server_notes", "serving_problems"]

SERVERS = ("vLLM", "SGLang", "llama.cpp")
_CACHED = (320, 576)  # widths of a cached token that the latent kernels of vLLM take


@dataclass(frozen=True, slots=True)
class _Rule:
    """One thing that stands in the way.

    Args:
        holds: Whether it does, by config.json.
        problem: What it is, as a sentence with config keys in braces.
        servers: Those that it keeps from loading the file, or from computing what it means.
    """

    holds: Callable[[Mapping[str, Any]], bool]
    problem: str
    servers: tuple[str, ...] = SERVERS


_RULES = (
    _Rule(
        lambda c: c["model_type"] != "deepseek_v3",
        "model_type {model_type} is not known everywhere, deepseek_v3 is",
    ),
    _Rule(lambda c: bool(c["attention_bias"]), "the attention has biases, which are ignored"),
    _Rule(
        lambda c: c["rope_parameters"]["rope_type"] != "default",
        "the rotary frequencies are a list, which is read as YaRN",
    ),
    _Rule(
        lambda c: c["rms_norm_eps"] != EPSILON,
        f"the latent norm is written for epsilon {EPSILON}, and rms_norm_eps is {{rms_norm_eps}}",
    ),
    _Rule(
        lambda c: bool(c["tie_word_embeddings"]),
        "input and output embeddings are one tensor, but two are looked for",
    ),
    _Rule(
        lambda c: c["hidden_act"] != "silu",
        "hidden_act is {hidden_act}, and only silu is implemented",
    ),
    _Rule(
        lambda c: c["kv_lora_rank"] + c["qk_rope_head_dim"] not in _CACHED,
        "a cached token has {kv_lora_rank} + {qk_rope_head_dim} numbers, neither 320 nor 576",
        ("vLLM",),
    ),
)


def serving_problems(config: Mapping[str, Any]) -> list[str]:
    """Why servers would not load a result, or would compute something else; empty if none.

    Args:
        config: The result's config.json.
    """
    return [
        f"{', '.join(rule.servers)}: {rule.problem.format_map(config)}"
        for rule in _RULES
        if rule.holds(config)
    ]


def server_notes(config: Mapping[str, Any]) -> dict[str, str]:
    """One sentence for each server: that it loads the result, or the first reason why not.

    Args:
        config: The result's config.json.
    """
    notes = {}
    for server in SERVERS:
        against = [r for r in _RULES if server in r.servers and r.holds(config)]
        notes[server] = (
            f"{server} does not serve it: {against[0].problem.format_map(config)}."
            if against
            else f"{server} serves it as a DeepSeek model."
        )
    return notes
