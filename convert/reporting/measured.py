"""What a manifest says was measured of a conversion, checked, so that a report can rely on it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from convert.harness import TaskScores
from convert.retrieval import Retrieval

__all__ = ["Checked", "Evaluation", "Point", "Probe", "TaskScores", "Text", "Training"]


class Checked(BaseModel):
    """A part of a manifest; what a report has no use for is not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class _Against(Checked):
    perplexity: float
    kl: float
    top1: float


class Evaluation(Checked):
    """A saved measurement; ``against`` compares with the source."""

    text: str
    text_sha256: str
    windows: int
    context: int
    stride: int
    dtype: str
    tokens: int
    perplexity: float
    against: _Against | None

    @property
    def setting(self) -> tuple[str, str, int, int, int, str]:
        """What was measured on; only measurements that agree in it can be compared."""
        return (
            self.text,
            self.text_sha256,
            self.windows,
            self.context,
            self.stride,
            self.dtype,
        )


class Text(Checked):
    """A text; one that was streamed has no hash."""

    name: str
    sha256: str | None


class Point(Checked):
    """State of a run after some tokens; all in nats per token, ``eval_*`` of the held-out text."""

    tokens: int
    kl: float | None = None
    ce: float | None = None
    eval_kl: float | None = None
    eval_nll: float | None = None


class _TrainingRecipe(Checked):
    context: int
    eval_samples: int
    groups: str
    lora: int | None


class Training(Checked):
    """One uptraining run.

    Args:
        tokens: Trained on.
        steps: Of the optimiser.
        curve: From before training to its end.
        teacher: Name of what it learnt from, if anything.
        data: The text.
        eval_text: The one that was held out, if any.
        recipe: As far as a report shows it.
        versions: Of the packages that did it.
    """

    tokens: int
    steps: int
    curve: list[Point] = Field(min_length=1)
    teacher: str | None
    data: Text
    eval_text: Text | None
    recipe: _TrainingRecipe
    versions: dict[str, str]


def _fits_together(found: Retrieval) -> Retrieval:
    """A probe whose tables can be drawn.

    Raises:
        ValueError: If its cells are not those of its lengths and depths, or are compared in part.
    """
    places = [(length, depth) for length in found.lengths for depth in found.depths]
    if [(cell.length, cell.depth) for cell in found.cells] != places:
        raise ValueError("cells are not those of lengths and depths")
    means = [found.exact, found.gain]
    means += [mean for cell in found.cells for mean in (cell.exact, cell.gain)]
    if len({mean.source is None for mean in means}) != 1:
        raise ValueError("some cells are compared with the source and some are not")
    if any((mean.source is None) != (mean.difference is None) for mean in means):
        raise ValueError("a difference stands without its source, or the other way round")
    return found


Probe = Annotated[Retrieval, AfterValidator(_fits_together)]
