"""Mutations of weight files, indexes, and of what lies beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.faults.builders import frame, header_of
from tests.fuzz.draft import Draft, Mutation, replaced
from tests.fuzz.values import ODD

__all__ = ["FILES", "INDEXES", "SIDE_FILES"]

_INDEX = "model.safetensors.index.json"


def truncated(draft: Draft, random: Random) -> str:
    file = random.choice(draft.files)
    content = file.read_bytes()
    size = random.choice((0, 1, 7, 8, 9, len(content) - 1, random.randrange(len(content))))
    replaced(file, content[:size])
    return f"{file.name} to {size}"


def lengthened(draft: Draft, random: Random) -> str:
    file = random.choice(draft.files)
    replaced(file, file.read_bytes() + bytes(random.choice((1, 4, 4096))))
    return file.name


def not_weights(draft: Draft, random: Random) -> str:
    file = random.choice(draft.files)
    content = random.choice(
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n",
            b"<!DOCTYPE html><html></html>",
            b"\x00" * 4096,
            b"\xff" * 4096,
            b"PK\x03\x04" + bytes(200),
        )
    )
    replaced(file, content)
    return f"{file.name} {content[:12]!r}"


def header_length(draft: Draft, random: Random) -> str:
    file = random.choice(draft.files)
    length = random.choice((0, 1, 2, 10**8, 2**40, 2**63, 2**64 - 1))
    replaced(file, length.to_bytes(8, "little") + file.read_bytes()[8:])
    return f"{file.name} {length}"


def header_text(draft: Draft, random: Random) -> str:
    file = random.choice(draft.files)
    header, data = header_of(file.read_bytes())
    text = json.dumps(header).encode()
    damaged = random.choice(
        (
            text[:-1],
            b"[]",
            b"null",
            b"{}",
            b"{" + text,
            text.replace(b"}", b"]", 1),
            b"\xff" + text,
            text.replace(b"{", b'{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, ', 1),
            b"[" * 3000,
        )
    )
    replaced(file, frame(damaged, data))
    return f"{file.name} {damaged[:30]!r}"


def header_entry(draft: Draft, random: Random) -> str:
    """One entry says something else of its tensor."""
    file = random.choice(draft.files)
    header, data = header_of(file.read_bytes())
    name = random.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    first, last = entry["data_offsets"]
    key, value = random.choice(
        (
            ("shape", [2**40, 2**20]),
            ("shape", [2**63]),
            ("shape", [10**9, 48]),
            ("shape", [10**12, 0]),
            ("shape", [-1, -48]),
            ("shape", [1.0]),
            ("shape", [True]),
            ("shape", [*entry["shape"], 1]),
            ("shape", entry["shape"][::-1]),
            ("shape", random.choice(ODD)),
            ("dtype", "F4"),
            ("dtype", "U32"),
            ("dtype", "C64"),
            ("dtype", random.choice(ODD)),
            ("data_offsets", [first, last + 4]),
            ("data_offsets", [first - 4, last - 4]),
            ("data_offsets", [0, last - first]),
            ("data_offsets", [last, first]),
            ("data_offsets", [10**15, 10**15 + last - first]),
            ("data_offsets", random.choice(ODD)),
            ("more", 1),
        )
    )
    if random.random() < 0.2:
        del entry["dtype"]
    replaced(file, frame({**header, name: {**entry, key: value}}, data))
    return f"{file.name} {name!r} {key} {value!r}"


def metadata(draft: Draft, random: Random) -> str:
    file = random.choice(draft.files)
    header, data = header_of(file.read_bytes())
    value = random.choice((*ODD, {"format": "tf"}, {"format": None}, {"x": ["y"]}))
    replaced(file, frame({**header, "__metadata__": value}, data))
    return f"{file.name} {value!r}"


def no_file(draft: Draft, random: Random) -> str:
    file = random.choice(draft.files)
    file.unlink()
    instead, make = random.choice(_INSTEAD)
    make(file)
    return f"{instead} {file.name}"


_INSTEAD: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("nothing for", lambda path: None),
    ("a folder for", Path.mkdir),
    ("a dangling link for", lambda path: path.symlink_to("nowhere")),
    ("a link to itself for", lambda path: path.symlink_to(path)),
    ("a link outside for", lambda path: path.symlink_to("/etc/passwd")),
    ("a device for", lambda path: path.symlink_to("/dev/zero")),
    ("a pipe for", os.mkfifo),
)


def pickled(draft: Draft, random: Random) -> str:
    """Weights by torch.save, sound or not, allowed or not."""
    tensors: dict[Any, Any] = {n: t for file in draft.files for n, t in draft.tensors(file).items()}
    for file in draft.files:
        file.unlink()
    (draft.source / _INDEX).unlink(missing_ok=True)
    name = random.choice(sorted(tensors))
    kind, change = random.choice(_PICKLED)
    change(tensors, name)
    torch.save(tensors, draft.source / "pytorch_model.bin")
    draft.recipe["allow_pickle"] = random.random() < 0.9
    return f"{kind} {name!r}"


def _damaged(tensors: dict[Any, Any], name: str, value: Any) -> None:
    tensors[name] = value


_PICKLED: tuple[tuple[str, Callable[[dict[Any, Any], str], object]], ...] = (
    ("sound", lambda tensors, name: None),
    ("sound", lambda tensors, name: None),
    ("transposed", lambda tensors, name: _damaged(tensors, name, tensors[name].movedim(0, -1))),
    ("text for", lambda tensors, name: _damaged(tensors, name, "x")),
    ("sparse", lambda tensors, name: _damaged(tensors, name, tensors[name].to_sparse())),
    ("meta", lambda tensors, name: _damaged(tensors, name, tensors[name].to("meta"))),
    ("number as a name beside", lambda tensors, name: _damaged(tensors, 7, tensors[name])),
    ("shared with another", lambda tensors, name: _damaged(tensors, "x", tensors[name])),
    ("complex", lambda tensors, name: _damaged(tensors, name, tensors[name].to(torch.complex64))),
    ("nested", lambda tensors, name: _damaged(tensors, name, {"weight": tensors[name]})),
    ("parameter", lambda tensors, name: _damaged(tensors, name, _parameter(tensors[name]))),
)


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.clone(), requires_grad=False)


def index_missing(draft: Draft, random: Random) -> str:
    (draft.source / _INDEX).unlink(missing_ok=True)
    return ""


def index_entry(draft: Draft, random: Random) -> str:
    index = draft.index
    names = sorted(index["weight_map"])
    name = random.choice((random.choice(names), "more.weight", "lm_head.weight", ""))
    file = random.choice(
        (
            *("missing.safetensors", "../model.safetensors", "/etc/passwd", "config.json", ""),
            *("MODEL.SAFETENSORS", "sub/model.safetensors", "x\x00.safetensors", ".safetensors"),
            *("x" * 300 + ".safetensors", "pytorch_model.bin", *ODD),
            *(file.name for file in draft.files),
        )
    )
    index["weight_map"][name] = file
    draft.reindex(index)
    return f"{name!r} in {file!r}"


def index_entry_missing(draft: Draft, random: Random) -> str:
    index = draft.index
    name = random.choice(sorted(index["weight_map"]))
    del index["weight_map"][name]
    draft.reindex(index)
    return name


def index_odd(draft: Draft, random: Random) -> str:
    value = random.choice((*ODD, {"weight_map": random.choice(ODD)}, {"metadata": 5}))
    draft.reindex(value)
    return repr(value)


def index_text(draft: Draft, random: Random) -> str:
    text = json.dumps(draft.index).encode()
    damaged = random.choice((b"", text[: len(text) // 2], b"\xff" + text, b"<html>"))
    replaced(draft.source / _INDEX, damaged)
    return repr(damaged[:20])


def index_of_one_file(draft: Draft, random: Random) -> str:
    draft.reindex(draft.index)
    return ""


def stray_file(draft: Draft, random: Random) -> str:
    name = random.choice(
        (
            *("model.safetensors", "model-00009-of-00009.safetensors", "x.safetensors"),
            *("pytorch_model.bin", "adapter_model.safetensors", "consolidated.safetensors"),
            *("training_args.bin", "pytorch_model.bin.index.json", ".hidden.safetensors"),
        )
    )
    content = random.choice((b"", b"{}", draft.files[0].read_bytes()))
    replaced(draft.source / name, content)
    return f"{name} of {len(content)} bytes"


def tokenizer_file(draft: Draft, random: Random) -> str:
    path = draft.source / random.choice(("tokenizer.json", "tokenizer_config.json"))
    content = path.read_bytes() if path.is_file() else b""
    value = random.choice(
        (
            *(None, b"", content[: len(content) // 2], b"{}", b"[]", b"null", b"5", b"\xff\xfe"),
            *(b'{"version": "1.0"}', b'{"model": {"type": "BPE"}}', b'"text"'),
        )
    )
    replaced(path, value or b"")
    if value is None:
        path.unlink()
    return f"{path.name} {value!r:.60}"


def tokenizer_key(draft: Draft, random: Random) -> str:
    path = draft.source / "tokenizer_config.json"
    config = _object(path)
    key, value = random.choice(
        (
            ("tokenizer_class", "LlamaTokenizer"),
            ("tokenizer_class", "NoSuchTokenizer"),
            ("tokenizer_class", random.choice(ODD)),
            ("auto_map", {"AutoTokenizer": ["tokenization_x.X", None]}),
            ("added_tokens_decoder", {"97": {"content": "<extra>", "special": True}}),
            ("added_tokens_decoder", random.choice(ODD)),
            ("chat_template", random.choice(ODD)),
            ("model_max_length", random.choice(ODD)),
            ("pad_token", random.choice(("<extra>", *ODD))),
            ("bos_token", random.choice(("<bos>", *ODD))),
            ("add_bos_token", True),
            ("extra_special_tokens", random.choice(ODD)),
        )
    )
    replaced(path, json.dumps(config | {key: value}).encode())
    return f"{key} = {value!r}"


def tokenizer_vocabulary(draft: Draft, random: Random) -> str:
    """More tokens than the embedding has, or ids far beyond it."""
    path = draft.source / "tokenizer.json"
    tokenizer = {"model": {"vocab": {}}} | _object(path)
    more = random.choice((("<a>", 97), ("<a>", 10**6), ("!", 10**5), ("<a>", -1), ("<a>", "1")))
    tokenizer["model"] = {**tokenizer["model"], "vocab": _vocabulary(tokenizer) | dict([more])}
    replaced(path, json.dumps(tokenizer).encode())
    return repr(more)


def _object(path: Path) -> dict[str, Any]:
    """What is in a JSON file; nothing if it is damaged already."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes()) if path.is_file() else {}
        return found if isinstance(found, dict) else {}
    return {}


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tokenizer["model"].get("vocab", {})
    return found


def side_file(draft: Draft, random: Random) -> str:
    name = random.choice(
        (
            *("generation_config.json", "chat_template.jinja", "adapter_config.json", "README.md"),
            *("special_tokens_map.json", "added_tokens.json", "kvpatch.json", "LICENSE"),
            *("vocab.json", "merges.txt", "tokenizer.model", "modeling_x.py", "tokenizer.py"),
            *("custom_generate/generate.py", "additional_chat_templates/x.jinja"),
            *("preprocessor_config.json", "quantize_config.json", ".hidden", "Notice ü\n.txt"),
        )
    )
    content = random.choice(
        (
            *(b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{% for", b"{", b'{"do_sample": 5}'),
            *(b'{"max_length": -1}', b'{"temperature": 0.1, "do_sample": false}', b'{"x": NaN}'),
            *(b'{"eos_token_id": "x", "cache_implementation": 5}', b'{"format_version": 1}'),
            *(b"---\nlicense: apache-2.0\n---\n", b"---\nlicense: [1]\n---\n", b"---\n[\n---\n"),
            *(b"---\nlanguage: !!python/name:os.system\n---\n", b"---\nx: &a [*a]\n---\n"),
            *(b"---\ndatasets: {a: b}\n---\n", b"---\ntags: 5\nlicense: ~\n---\n"),
        )
    )
    path = draft.source / name
    path.parent.mkdir(exist_ok=True)
    replaced(path, content)
    return f"{name!r} {content!r:.60}"


def side_file_is_no_file(draft: Draft, random: Random) -> str:
    name = random.choice(
        (
            *("generation_config.json", "tokenizer.json", "LICENSE", "README.md"),
            *("chat_template.jinja", "tokenizer_config.json", "additional_chat_templates"),
        )
    )
    path = draft.source / name
    replaced(path, b"")
    path.unlink()
    instead, make = random.choice(_INSTEAD[1:])
    make(path)
    return f"{instead} {name}"


FILES = tuple(
    Mutation(2, change)
    for change in (
        truncated,
        lengthened,
        not_weights,
        header_length,
        header_text,
        header_entry,
        header_entry,
        header_entry,
        metadata,
        no_file,
        pickled,
    )
)
INDEXES = (
    *(Mutation(2, change) for change in (index_missing, index_entry, index_entry)),
    *(Mutation(2, change) for change in (index_entry_missing, index_odd, index_text)),
    *(Mutation(2, change) for change in (index_of_one_file, stray_file, stray_file)),
)
SIDE_FILES = tuple(
    Mutation(0, change)
    for change in (
        tokenizer_file,
        tokenizer_key,
        tokenizer_vocabulary,
        side_file,
        side_file,
        side_file_is_no_file,
    )
)
