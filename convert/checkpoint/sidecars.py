"""Everything in a checkpoint folder that is not weights: what is copied, and how."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from convert.checkpoint.paths import guarded_path

__all__ = ["DOWNLOADED", "NOT_DOWNLOADED", "SIDE_FILES", "side_files"]

SIDE_FILES = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.py",
    "tokenization_*.py",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "custom_generate/*",
    "tekken.json",
    "vocab.bpe",
    "encoder.json",
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
        if path.is_file() and any(_matches(name, pattern) for pattern in SIDE_FILES):
            guarded_path(root, name)
            names.append(name)
    return names


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name.lower(), pattern)
