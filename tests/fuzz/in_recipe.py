"""Mutations of recipes and of calibration texts."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tests.fuzz.draft import Draft, Mutation, replaced
from tests.fuzz.values import ODD, near

__all__ = ["RECIPES", "TEXTS"]

_KEYS: dict[str, tuple[Any, ...]] = {
    "allow_nonfinite": (True, False),
    "allow_pickle": (True, False),
    "arch": ("deepseek_v3", "youtu", "deepseek_v2"),
    "calibration": ("text.txt", "nowhere.txt", ".", "text.txt/x", "", "text\x00.txt"),
    "context": (1, 2, 16, 64, 65, 10**6, 2**63),
    "device": ("cpu", "cuda", "cuda:9", "meta", "mps", "cpu:3", "nonsense", "", "xla", "vulkan"),
    "dtype": ("float32", "bfloat16", "float16", "float64", "int8"),
    "group": ("adjacent", "similar", "nonsense"),
    "kv_budget": (
        *("50%", "25%", "100%", "0%", "0.001%", "1000%", "12+4", "12+0", "0+4", "12+3", "-1+4"),
        *("", "%", "+", "nan%", "1e400%", "12 + 4", "12+4+4", "999999+2", "2+999998", "½%", "5"),
    ),
    "kv_heads": (1, 2, 3, 4, 5, 8, 10**12),
    "layers": (":", "0:2", "1:", ":1", "auto", "2:1", "-1:", "0:99", "a:b", "", "1", "::", "0:2:1"),
    "match": (True, False),
    "max_ram": ("1B", "1KB", "1GB", "0GB", "-1GB", "1e3GB", "GB", "", "99999999999999GB", "nanGB"),
    "max_shard_size": ("1B", "1KB", "20KB", "5GB", "0", "0KB", "-5GB", "1e400GB", "5 GB", "5gb"),
    "merge": ("mean", "first", "svd", "median"),
    "method": ("gqa", "mqa", "cla", "mla", "export", "uptrain", "nonsense"),
    "overwrite": (True, False),
    "per_layer": (True, False),
    "rank": (1, 2, 12, 48, 49, 50, 10**6, 2**63),
    "refit": ("none", "q", "o", "qo", "oq"),
    "resume": (True, False),
    "revision": ("main", "", "x\ny"),
    "rope_dims": (0, 1, 2, 4, 10, 40, 400, 10**6, 2**63),
    "rope_select": ("greedy", "per-frequency", "stride", "nonsense"),
    "samples": (1, 3, 25, 10**6, 2**63),
    "seed": (0, 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**30),
    "serving": (True, False),
    "share": (2, 3, 4, 99, 2**63),
    "target": ("native", "kvpatch", "nonsense"),
    "unknown": (1,),
    "kv-heads": (2,),
    "kv_head": (2,),
}


def recipe_key(draft: Draft, random: Random) -> str:
    key = random.choice(sorted(_KEYS))
    return _recipe(draft, key, random.choice(_KEYS[key]))


def recipe_keys(draft: Draft, random: Random) -> str:
    keys = random.sample(sorted(_KEYS), random.randint(2, 4))
    return ", ".join(_recipe(draft, key, random.choice(_KEYS[key])) for key in keys)


def recipe_odd(draft: Draft, random: Random) -> str:
    return _recipe(draft, random.choice(sorted(_KEYS)), random.choice(ODD))


def recipe_near(draft: Draft, random: Random) -> str:
    key = random.choice(sorted(draft.recipe))
    return _recipe(draft, key, near(draft.recipe[key], random))


def recipe_key_missing(draft: Draft, random: Random) -> str:
    key = random.choice(sorted(draft.recipe))
    del draft.recipe[key]
    return key


def _recipe(draft: Draft, key: str, value: Any) -> str:
    draft.recipe[key] = value
    return f"{key}: {value!r}"


_LINES: tuple[object, ...] = (
    {"text": "abc" * 60},
    {"text": ""},
    {"text": None},
    {"text": 5},
    {"text": ["a", "b"]},
    {"text": {"text": "a"}},
    {"text": "ab" * 60, "more": 1},
    {"content": "a" * 100},
    {"messages": [{"role": "user", "content": "a"}]},
    {},
    [],
    ["a"],
    "text",
    5,
    None,
)
_TEXTS = (
    b"",
    b"a",
    b"\n",
    b" " * 500,
    "äö北京 ".encode() * 200,
    b"\xff\xfe" * 200,
    b"\x00" * 500,
    b"\xef\xbb\xbf" + b"abc" * 200,
    b"abc\r\n" * 200,
    b"a" * 300_000,
    b"<pad>" * 200,
    b"abc" * 15,
    b"abcdefgh" * 40,
)


def text(draft: Draft, random: Random) -> str:
    content = random.choice(_TEXTS)
    return _text(draft, random, ".txt", content)


def text_jsonl(draft: Draft, random: Random) -> str:
    lines = [json.dumps(random.choice(_LINES)) for _ in range(random.randint(1, 6))]
    broken = random.choice((None, None, "{", '{"text": NaN}', '{"text": "\\ud800"}', "\ufeff", ""))
    lines += [] if broken is None else [broken]
    return _text(draft, random, random.choice((".jsonl", ".ndjson")), "\n".join(lines).encode())


def text_parquet(draft: Draft, random: Random) -> str:
    return _text(draft, random, ".parquet", random.choice((b"", b"PAR1", b"PAR1" * 50)))


def text_is_no_file(draft: Draft, random: Random) -> str:
    kind = random.choice(("missing", "folder", "dangling"))
    done = _text(draft, random, ".txt", b"")
    draft.text.unlink()
    if kind == "folder":
        draft.text.mkdir()
    elif kind == "dangling":
        draft.text.symlink_to("nowhere")
    return f"{kind} {done}"


def _text(draft: Draft, random: Random, suffix: str, content: bytes) -> str:
    """Another text, and a recipe that reads it."""
    draft.text = draft.text.with_name(f"odd{suffix}")
    replaced(draft.text, content)
    draft.recipe |= {"calibration": draft.text.name, "samples": 3, "context": 16}
    if draft.recipe.get("method") != "mla":
        draft.recipe["merge"] = "svd"
    return f"{suffix} {content!r:.60}"


RECIPES = tuple(
    Mutation(0, change)
    for change in (recipe_key, recipe_key, recipe_keys, recipe_odd, recipe_near, recipe_key_missing)
)
TEXTS = tuple(
    Mutation(0, change)
    for change in (text, text, text_jsonl, text_jsonl, text_parquet, text_is_no_file)
)
