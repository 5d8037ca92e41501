"""Recipes: the whole truth of a conversion, as models that refuse what they do not know."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from convert.quantities import parse_budget, parse_size
from kvpatch.errors import UsageError

__all__ = [
    "ClaRecipe",
    "ExportRecipe",
    "GqaRecipe",
    "MlaRecipe",
    "MqaRecipe",
    "Recipe",
    "make_recipe",
    "place",
    "validated",
]


def _checked_size(text: str) -> str:
    parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_checked_size)]


TargetName = Literal["native", "kvpatch"]
TARGET = Field(
    None, description="Class of transformers or of kvpatch; the former where one holds the result."
)


class _Conversion(BaseModel):
    """Keys that every conversion has; each is a flag of the same name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str = Field(description="Folder, or org/name[@revision] on the Hub.", min_length=1)
    output: str | None = Field(None, description="Folder to make; must not exist.", min_length=1)
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub source.")
    adapter: Literal["merge", "ignore"] | None = Field(
        None, description="What to do with an adapter beside the weights; must be given for one."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Dtype of the weights written; the source's if not given."
    )
    max_shard_size: Size = Field("5GB", description="Largest weight file.")
    max_ram: Size | None = Field(None, description="Refuse to start if more memory is needed.")
    overwrite: bool = Field(False, description="Replace an earlier result at the output.")
    resume: bool = Field(True, description="Continue an interrupted run of the same conversion.")
    allow_pickle: bool = Field(False, description="Read .bin weights, without running their code.")
    allow_nonfinite: bool = Field(False, description="Copy weights that hold NaN or infinity.")

    @property
    def planned_from_headers(self) -> bool:
        """Whether the plan needs the shapes of the weights alone, and not what is in them."""
        return True


class _Latent(_Conversion):
    """Keys of conversions whose results have latents."""

    arch: Literal["deepseek_v3", "youtu"] = Field(
        "deepseek_v3", description="Stock class of a native result."
    )
    serving: bool = Field(
        False, description="Write the bias-free form that servers of DeepSeek models load."
    )

    @property
    def kv_heads(self) -> None:
        """A latent has no heads."""
        return

    @property
    def merge(self) -> None:
        """Nothing is merged."""
        return


class _Calibrated(_Conversion):
    """Keys of conversions that can be calibrated on a text."""

    refit: Literal["none", "q", "o", "qo"] | None = Field(
        None,
        description="Least squares afterwards, of queries and keys (q) and of values and output "
        "(o); qo with a calibration text, for merges if merge is svd, else none.",
    )
    calibration: str | None = Field(
        None,
        description="Text, json, jsonl or parquet file to calibrate on; none is needed.",
        min_length=1,
    )
    samples: int = Field(96, ge=1, description="Calibration windows.")
    context: int | None = Field(
        None, ge=2, description="Tokens of a calibration window; 512 or the model's limit."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Chooses the calibration windows.")
    device: str = Field("cpu", description="Where calibration runs.", min_length=1)

    @model_validator(mode="after")
    def _refits_are_calibrated(self) -> Self:
        if self.calibration is None and self.refit not in {None, "none"}:
            raise ValueError(f"refit {self.refit} needs a calibration text")
        return self


class _Merging(_Calibrated):
    """Keys of conversions that merge KV heads."""

    merge: Literal["mean", "first", "svd"] = Field("mean", description="How KV heads become one.")

    @model_validator(mode="after")
    def _calibration_is_used(self) -> Self:
        if self.calibration is not None and self.merge != "svd" and self.refit in {None, "none"}:
            raise ValueError(f"merge {self.merge} without refit makes no use of calibration")
        return self


Group = Literal["adjacent", "similar"]
RopeSelect = Literal["greedy", "per-frequency", "stride"]


class _Grouping(_Merging):
    """A key of conversions that merge several KV heads, but not all."""

    group: Group | None = Field(
        None,
        description="Which KV heads become one; similar needs merge svd, and is its default with a "
        "calibration text.",
    )

    @model_validator(mode="after")
    def _grouping_needs_svd(self) -> Self:
        if self.group == "similar" and self.merge != "svd":
            raise ValueError("group similar needs merge svd, which says what a group would lose")
        return self


class GqaRecipe(_Grouping):
    """Pool the KV heads of every layer to ``kv_heads``."""

    method: Literal["gqa"] = "gqa"
    kv_heads: int = Field(ge=1, description="KV heads of each layer afterwards.")
    target: TargetName | None = TARGET


class MqaRecipe(_Merging):
    """Pool the KV heads of every layer to a single one."""

    method: Literal["mqa"] = "mqa"
    target: TargetName | None = TARGET

    @property
    def kv_heads(self) -> int:
        """KV heads of each layer afterwards."""
        return 1

    @property
    def group(self) -> Group:
        """All heads become one, so there is nothing to choose."""
        return "adjacent"


class ClaRecipe(_Merging):
    """Let adjacent layers share keys and values, and pool their heads if ``kv_heads`` is given."""

    method: Literal["cla"] = "cla"
    share: int = Field(ge=2, description="Layers for each set of keys and values.")
    kv_heads: int | None = Field(
        None, ge=1, description="KV heads afterwards; as many as before if not given."
    )
    layers: str = Field(
        ":", description="Layers that take part, FIRST:END; auto chooses those that lose least."
    )
    match: bool = Field(
        True, description="With merge svd: pair heads of different layers by what they lose."
    )

    @property
    def planned_from_headers(self) -> bool:
        """Which layers share may depend on what they would lose."""
        return self.layers != "auto"

    @property
    def group(self) -> Group | None:
        """Which heads are merged: matched ones with merge svd, else those at the same place."""
        return "similar" if self.merge == "svd" and self.match else "adjacent"

    @property
    def target(self) -> None:
        """No stock class shares keys and values across layers."""
        return


class MlaRecipe(_Calibrated, _Latent):
    """Factor keys and values of every layer into one latent and one rotary key per token."""

    method: Literal["mla"] = "mla"
    rank: int | None = Field(None, ge=1, description="Dims of the latent.")
    rope_dims: int | None = Field(
        None, ge=0, description="Dims of the rotary key; even. Give both, or a budget."
    )
    kv_budget: str | None = Field(
        None, description="Share of the source's KV cache, such as 25%, or its split, 512+64."
    )
    rope_select: RopeSelect | None = Field(
        None,
        description="Which components of the keys stay rotary: greedy, or stride with serving.",
    )
    per_layer: bool = Field(
        False, description="Give each layer as much of a budget as predicted losses say."
    )
    share: int | None = Field(None, ge=2, description="Layers for each latent; one if not given.")
    layers: str | None = Field(
        None, description="With share: layers that take part, FIRST:END; all if not given."
    )
    target: TargetName | None = TARGET

    @property
    def selection(self) -> RopeSelect:
        """What stays rotary; servers know no other frequencies than those of ``stride``."""
        return self.rope_select or ("stride" if self.serving else "greedy")

    @model_validator(mode="after")
    def _sizes_are_given(self) -> Self:
        explicit = self.rank is not None and self.rope_dims is not None
        if explicit == (self.kv_budget is not None) or (
            not explicit and (self.rank is not None or self.rope_dims is not None)
        ):
            raise ValueError("give rank and rope_dims, or kv_budget alone")
        if self.rope_dims is not None and self.rope_dims % 2:
            raise ValueError(f"rope_dims {self.rope_dims} is odd, but dims rotate in pairs")
        if self.kv_budget is not None:
            parse_budget(self.kv_budget)
        if self.serving and self.target == "kvpatch":
            raise ValueError("serving is for native results: leave target kvpatch out")
        return self

    @property
    def uneven(self) -> tuple[str, str] | None:
        """A key with which no class of transformers holds the result, and why."""
        if self.per_layer:
            return "per_layer", "they have one rank for all layers"
        if self.share is not None:
            return "share", "in them every layer has a latent of its own"
        return None

    @model_validator(mode="after")
    def _uneven_latents_are_ours(self) -> Self:
        native = {
            "target native": self.target == "native",
            "serving": self.serving,
            f"arch {self.arch}": self.arch != "deepseek_v3",
        }
        asked = next((key for key, given in native.items() if given), None)
        if self.uneven is not None and asked is not None:
            key, why = self.uneven
            raise ValueError(
                f"{key} does not go with {asked}, which is for classes of transformers: {why}"
            )
        if self.per_layer and not isinstance(parse_budget(self.kv_budget or "1+0"), float):
            raise ValueError(
                "per_layer distributes a kv_budget such as 25%: sizes that are given are those of "
                "every layer"
            )
        if self.layers is not None and self.share is None:
            raise ValueError("layers says which layers share: give share too, or leave layers out")
        if self.layers == "auto":
            raise ValueError("layers auto is for kvpatch cla: give layers as FIRST:END")
        return self


class ExportRecipe(_Latent):
    """Write a model with latents in another form, without changing what it computes."""

    method: Literal["export"] = "export"
    target: TargetName = Field(description="Class of transformers or of kvpatch.")

    @property
    def planned_from_headers(self) -> bool:
        """What the target can hold depends on biases and norms."""
        return False

    @property
    def calibration(self) -> None:
        """Nothing is calibrated."""
        return

    @model_validator(mode="after")
    def _form_has_a_class(self) -> Self:
        if self.target == "kvpatch" and (self.serving or self.arch != "deepseek_v3"):
            raise ValueError("arch and serving are for native results: give target native")
        return self


Recipe = GqaRecipe | MqaRecipe | ClaRecipe | MlaRecipe | ExportRecipe
Model = TypeVar("Model", bound=BaseModel)
_BY_METHOD: Mapping[str, type[Recipe]] = {
    "gqa": GqaRecipe,
    "mqa": MqaRecipe,
    "cla": ClaRecipe,
    "mla": MlaRecipe,
    "export": ExportRecipe,
}


def make_recipe(
    values: Mapping[str, Any],
    *,
    where: str = "command line",
    lines: Mapping[str, int] | None = None,
) -> Recipe:
    """Check values and make the recipe of their ``method``.

    Args:
        values: Recipe keys.
        where: File they come from, for messages.
        lines: Line of each key in that file.

    Raises:
        UsageError: Naming the line, the key, and the nearest valid name of a misspelt key.
    """
    lines = lines or {}
    method = values.get("method")
    if not isinstance(method, str) or method not in _BY_METHOD:
        raise UsageError(
            f"{place(where, lines.get('method'))}: method must be one of "
            f"{', '.join(_BY_METHOD)}, found {method!r}"
        )
    return validated(_BY_METHOD[method], values, where=where, lines=lines)


def validated(
    model: type[Model],
    values: Mapping[str, Any],
    *,
    where: str = "command line",
    lines: Mapping[str, int] | None = None,
) -> Model:
    """Check values against a model of recipes.

    Args:
        model: The recipe's class.
        values: Recipe keys.
        where: File they come from, for messages.
        lines: Line of each key in that file.

    Raises:
        UsageError: Naming the line, the key, and the nearest valid name of a misspelt key.
    """
    lines = lines or {}
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [
            f"{place(where, lines.get(str(e['loc'][0]) if e['loc'] else ''))}: {_explain(e, model)}"
            for e in error.errors()
        ]
        raise UsageError("\n".join(problems)) from None


def place(where: str, line: int | None) -> str:
    """Where a key stands, for messages; line 0 is an override on the command line."""
    if line == 0:
        return "--set"
    return where if line is None else f"{where}:{line}"


def _explain(error: Any, model: type[BaseModel]) -> str:
    if not error["loc"]:  # several keys that do not go together
        return str(error["msg"]).removeprefix("Value error, ")
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, n=1)
        return f"unknown key {key!r}" + (
            f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(model.model_fields)}"
        )
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        message = f"must be {error['ctx']['expected']}"
    return f"{key}: {message}, found {error['input']!r}"
