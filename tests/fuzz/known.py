"""Violations that are known and not mended yet, each with the reason; to be emptied."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["reason_of"]


@dataclass(frozen=True, slots=True)
class Open:
    """A kind of violation.

    Args:
        says: Pattern that is found in the words of all violations of this kind, and of no others.
        reason: Why it is not mended yet.
    """

    says: str
    reason: str


_NAMES = "opening a source does not hold names and shapes outside of the attention to the class"
_EARLY = "tensors are looked at before their names, shapes and dtypes are checked"
_CLASS = "values that only the stock class knows are not checked before it is built"
_TOKENIZER = "not all that tokenizer files can raise is an error of the input model"
_ZERO = "verify divides by the largest logit, which may be 0"
_BEGUN = r"run recipe.yaml( --dry-run)? ended with 1: this is a bug in kvpatch: "
_CHECKED = r"verify \S+ \S+ ended with 1: this is a bug in kvpatch: "

OPEN = (
    Open(r"^verify ended with 6: loading: \S+ loads with \{", _NAMES),
    Open(r"^verify ended with 6: loading: .*(ignore_mismatched_sizes|`CONVERSION`)", _NAMES),
    Open(r"^verify ended with 6: shapes: config.json contradicts the tensors", _NAMES),
    Open(r"^verify ended with 6: untouched tensors: .* (was not converted|has no place)", _NAMES),
    Open(r"the run ended with 3: .*transformers' class and the checkpoint differ in", _NAMES),
    Open(r"^planned, but inspect ended with 3: 'config.json contradicts the tensors", _NAMES),
    Open(_BEGUN + r"AssertionError:  \(convert/methods/(attended|merge|mixing)\.py", _EARLY),
    Open(
        _BEGUN + r"RuntimeError: .*\(convert/(families/packing|decoder|methods/merge)\.py", _EARLY
    ),
    Open(_BEGUN + r"RuntimeError: .*\(convert/targets/deepseek_layer\.py", _EARLY),
    Open(r"^the dry run ended with 2: .no class with latent attention holds", _EARLY),
    Open(r"^verify \S+ \S+ took \d+ MB", _NAMES),
    Open(_BEGUN + r"NotImplementedError: .*Float8.*\(convert/execute\.py", _EARLY),
    Open(r"^the dry run ended with 3: .*(contradicts the tensors|are quantised)", _EARLY),
    Open(_BEGUN + r".*\(convert/decoder\.py", _CLASS),
    Open(
        _CHECKED + r".*\((convert/loading\.py:102|kvpatch/models/modeling_kvpatch\.py:90)\)", _CLASS
    ),
    Open(r"^verify ended with 6: loading: .* Invalid `cache_implementation`", _CLASS),
    Open(_CHECKED + r".*\(convert/(loading\.py:126|verify\.py:147)\)", _TOKENIZER),
    Open(_BEGUN + r".*\(convert/loading\.py:126\)", _TOKENIZER),
    Open(r"^verify ended with 6: tokens: \S+ has no tokenizer", _TOKENIZER),
    Open(_BEGUN + r".*\(convert/texts\.py", "texts: what is no text in jsonl, NUL in a path"),
    Open(
        r"^verify ended with 6: cached decoding: .* differ by nan of the largest$",
        _ZERO,
    ),
)
# what the command said is known, too, where the run that ended with a bug is
_ECHOES = r"^(the dry run passed, the run|verify) ended with 1: .?this is a bug in kvpatch"


def reason_of(found: list[str]) -> str | None:
    """Why the violations of a case are known; None if one of them is not."""
    told = [text for text in found if not re.search(_ECHOES, text)]
    reasons = [
        next((row.reason for row in OPEN if re.search(row.says, text, re.DOTALL)), None)
        for text in told
    ]
    return reasons[0] if reasons and all(reasons) else None
