"""The recipe of an uptraining run; each key is a flag of the same name."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from convert.training.groups import Groups
from convert.training.schedule import Decay

__all__ = ["UptrainRecipe", "parse_count"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(value: Any) -> int:
    """Tokens of ``300k``, ``1.5M``, ``2B`` or a plain number.

    Raises:
        ValueError: If it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", str(value).replace("_", "").upper())
    if (
        match is None
        or isinstance(value, bool)
        or not (n := round(float(match[1]) * _UNITS[match[2]]))
    ):
        raise ValueError("not a number of tokens such as 300k or 1.5M")
    return n


Count = Annotated[int, BeforeValidator(parse_count)]


class UptrainRecipe(BaseModel):
    """Train a converted model towards its source."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: Literal["uptrain"] = "uptrain"
    source: str = Field(description="A result of kvpatch; it stays as it is.", min_length=1)
    output: str | None = Field(None, description="Folder to make; must not exist.", min_length=1)
    teacher: str | None = Field(
        None,
        description="Folder, or org/name[@revision] on the Hub, to learn from; the source's own "
        "source if it was on the Hub.",
        min_length=1,
    )
    data: str = Field(
        description="Text, json, jsonl or parquet file, or hub:NAME[:CONFIG][@SPLIT], a streamed "
        "data set with a column text.",
        min_length=1,
    )
    eval_text: str | None = Field(
        None, description="Text, json, jsonl or parquet file to measure on during training."
    )
    eval_samples: int = Field(32, ge=1, description="Sequences of it.")
    eval_every: Count | None = Field(None, description="Tokens from one measurement to the next.")
    tokens: Count = Field(description="Tokens to train on, such as 300k or 1.5M.")
    kl_target: float | None = Field(
        None, gt=0, description="Stop as soon as the measured KL is not above this, in nats."
    )
    batch: int = Field(8, ge=1, description="Sequences in one forward pass of one device.")
    context: int | None = Field(
        None, ge=2, description="Tokens of a sequence; 512 or the model's limit."
    )
    grad_accumulation: int = Field(1, ge=1, description="Forward passes for each step.")
    lr: float = Field(1e-4, gt=0, description="Highest learning rate.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which it rises.")
    decay: Decay = Field("cosine", description="How it falls: cosine, linear or constant.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    kl: float = Field(1.0, ge=0, description="Weight of the KL to the teacher.")
    ce: float = Field(0.0, ge=0, description="Weight of the cross entropy of the text.")
    hidden_mse: float = Field(
        0.0, ge=0, description="Weight of the error of hidden states, in the first phase."
    )
    groups: Groups = Field(
        "all", description="What is trained: attention, all, or attention-then-all."
    )
    first_phase: float = Field(
        0.2, gt=0, lt=1, description="Share of the steps in the first phase, if there are two."
    )
    lora: int | None = Field(None, ge=1, description="Rank of adapters; all weights if not given.")
    precision: Literal["bf16", "fp32"] | None = Field(
        None, description="Of the arithmetic; bf16 on GPUs and fp32 on CPUs if not given."
    )
    gradient_checkpointing: bool = Field(
        False, description="Less memory for a third more arithmetic."
    )
    checkpoint_every: Count | None = Field(
        None, description="Tokens from one checkpoint to the next; a twentieth of all."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Order of the text.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where it runs.")
    overwrite: bool = Field(False, description="Replace an earlier result at the output.")
    resume: bool = Field(True, description="Continue an interrupted run of the same recipe.")

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        if not self.kl and not self.ce:
            raise ValueError("kl and ce are both 0, so there is nothing to learn")
        if self.kl_target is not None and self.eval_text is None:
            raise ValueError("kl_target needs eval_text, on which the KL is measured")
        if self.kl_target is not None and not self.needs_teacher:
            raise ValueError("kl_target needs a teacher")
        if self.eval_every is not None and self.eval_text is None:
            raise ValueError("eval_every needs eval_text")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether there is anything to learn from a teacher, or to compare with one."""
        return bool(self.kl or self.hidden_mse or self.teacher)
