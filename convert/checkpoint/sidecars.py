"""Everything in a checkpoint folder that is not weights: what is copied, and how."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from convert.checkpoint.paths import guarded_path

__all__ = [
    "DOWNLOADED",
    "NOT_DOWNLOADED",
    "SIDE_FILES",
    "gathered_files",
    "side_files",
    "tokenizer_folder",
]

_VOCABULARY = (
    "tokenizer.json",
    "*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "encoder.json",
)
_TOKENIZER = (
    *_VOCABULARY,
    "tokenizer*.json",
    "tokenizer*.py",
    "tokenization_*.py",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.bpe",
)
SIDE_FILES = (
    *_TOKENIZER,
    "generation_config.json",
    "custom_generate/*",
    "*license*",
    "*licence*",
    "notice*",
    "use_policy*",
)

# what a conversion needs of a repository on the Hub
# other forms of the same weights that repositories hold beside them
NOT_DOWNLOADED = ("*/*.safetensors", "*/*.model", "*/tokenizer*", "consolidated*")
DOWNLOADED = (
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "README.md",
    "kvpatch.json",
    "training.png",
    ".eval_results/*",
    "*_kvpatch.py",
    *SIDE_FILES,
    "*LICENSE*",  # the Hub's patterns tell cases apart
    "*LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def side_files(root: Path) -> list[str]:
    """Relative names of the files to copy byte for byte, sorted.

    Weights, indexes, training state and the source's model card are not among them, nor modeling
    code of the source: the result loads in a stock class.
    """
    names = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and _any(name, SIDE_FILES):
            guarded_path(root, name)
            names.append(name)
    return names


def gathered_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Side files of several folders, by name the folder to take each from: the last that has it.

    What belongs to a tokenizer comes from one folder, ``tokenizer_folder``.
    """
    speaking = tokenizer_folder(folders)
    found = {
        name: folder
        for folder in folders
        for name in side_files(folder)
        if folder == speaking or not _any(name, _TOKENIZER)
    }
    return dict(sorted(found.items()))


def tokenizer_folder(folders: Sequence[Path]) -> Path:
    """The last of several folders that has a vocabulary; the first if none has."""
    having = [path for path in folders if any(_any(n, _VOCABULARY) for n in side_files(path))]
    return [folders[0], *having][-1]


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name.lower(), pattern)
