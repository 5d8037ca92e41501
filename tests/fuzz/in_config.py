"""Mutations of config.json."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

from tests.fuzz.draft import Draft, Mutation, replaced
from tests.fuzz.values import FOREIGN, MODEL_TYPES, ODD, ROPES, near

__all__ = ["CONFIG"]


def key_dropped(draft: Draft, random: Random) -> str:
    config = draft.config
    key = random.choice(sorted(config))
    del config[key]
    draft.configure(config)
    return key


def value_odd(draft: Draft, random: Random) -> str:
    config = draft.config
    return _set(draft, random.choice(sorted(config)), random.choice(ODD))


def value_null(draft: Draft, random: Random) -> str:
    return _set(draft, random.choice(sorted(draft.config)), None)


def value_near(draft: Draft, random: Random) -> str:
    config = draft.config
    key = random.choice(sorted(config))
    return _set(draft, key, near(config[key], random))


def value_of_another_key(draft: Draft, random: Random) -> str:
    config = draft.config
    keys = sorted(config)
    return _set(draft, random.choice(keys), config[random.choice(keys)])


def foreign_key(draft: Draft, random: Random) -> str:
    key = random.choice(sorted(FOREIGN))
    return _set(draft, key, copy.deepcopy(random.choice(FOREIGN[key])))


def foreign_key_odd(draft: Draft, random: Random) -> str:
    return _set(draft, random.choice(sorted(FOREIGN)), random.choice(ODD))


def model_type(draft: Draft, random: Random) -> str:
    return _set(draft, "model_type", random.choice(MODEL_TYPES))


def rope(draft: Draft, random: Random) -> str:
    key = random.choice(("rope_scaling", "rope_parameters"))
    return _set(draft, key, copy.deepcopy(random.choice(ROPES)))


def rope_near(draft: Draft, random: Random) -> str:
    key = random.choice(("rope_scaling", "rope_parameters"))
    return _set(draft, key, near(copy.deepcopy(random.choice(ROPES)), random))


def rope_inside(draft: Draft, random: Random) -> str:
    config = draft.config
    table = config.get("rope_parameters") or copy.deepcopy(random.choice(ROPES))
    key = random.choice(sorted(table))
    return _set(draft, "rope_parameters", {**table, key: random.choice(ODD)})


def keys_swapped(draft: Draft, random: Random) -> str:
    config = draft.config
    one, other = random.sample(sorted(config), 2)
    config[one], config[other] = config[other], config[one]
    draft.configure(config)
    return f"{one} <-> {other}"


def file_damaged(draft: Draft, random: Random) -> str:
    text = (draft.source / "config.json").read_bytes()
    damaged = random.choice(
        (
            text[: random.randrange(len(text))],
            b"",
            b"[]",
            b"null",
            b"\xff\xfe" + text,
            b"\xef\xbb\xbf" + text,
            text.replace(b"{", b'{"model_type": "llama", ', 1),
            b'{"a": ' * 5000,
            text.replace(b'"model_type"', b'"model\\ud800type"'),
        )
    )
    replaced(draft.source / "config.json", damaged)
    return repr(damaged[:40])


def file_missing(draft: Draft, random: Random) -> str:
    replaced(draft.source / "config.json", b"")
    (draft.source / "config.json").unlink()
    if random.random() < 0.3:
        (draft.source / "config.json").mkdir()
    return ""


def _set(draft: Draft, key: str, value: Any) -> str:
    draft.configure(draft.config | {key: value})
    return f"{key} = {value!r}"


CONFIG = (
    *(Mutation(0, change) for change in (key_dropped, value_null, value_odd, value_near)),
    *(Mutation(0, change) for change in (value_odd, value_near, value_of_another_key)),
    *(Mutation(0, change) for change in (foreign_key, foreign_key, foreign_key_odd, model_type)),
    *(Mutation(0, change) for change in (rope, rope_near, rope_inside, keys_swapped)),
    Mutation(3, file_damaged),
    Mutation(4, file_missing),
)
