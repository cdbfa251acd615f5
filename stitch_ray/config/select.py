"""Configuration of `select`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stitch_ray.config.base import DataConfig, ModelConfig, Strict


class RatingConfig(Strict):
    """How examples are rated. `mode`, `alpha`, `weights` and `token_prompt` never cause a new rating."""

    prompts: str | None = Field(None, description="file with one rating prompt a line; default: built in")
    num_prompts: int = Field(5, ge=1, description="how many of the prompts are used (K)")
    num_ratings: int = Field(5, ge=2, le=9, description="ratings 1..R, each a single token")
    layout: Literal["prompt_first", "content_first"] = Field(
        "prompt_first", description="prompt_first: the published order; content_first: about K times less work"
    )
    mode: Literal["paper", "repo"] = Field("paper", description="score formula: as published, or as the code has it")
    alpha: float = Field(0.2, ge=0, description="how much disagreement between prompts costs")
    weights: Literal["parameters", "repo"] | list[float] = Field("parameters", description="weights of the models")
    token_prompt: int = Field(0, ge=0, description="the prompt whose score is the token level")


class DiversityConfig(Strict):
    """Greedy choice by score under a cap on cosine similarity."""

    encoder: str = Field(description="SentenceTransformer folder or Hub id in the local cache")
    max_cosine: float = Field(
        0.9, gt=-1, le=1, description="an example closer than this to a chosen one is passed over"
    )


class SelectionConfig(Strict):
    """What is kept."""

    level: Literal["token", "sentence", "model"] | None = Field(
        None, description="score that decides; default: sentence with one model, model with several"
    )
    proportion: float | None = Field(None, gt=0, le=1, description="share of the rated rows, exact; default 0.2")
    count: int | None = Field(None, ge=1, description="number of rows, instead of proportion")
    method: Literal["score", "diverse", "random", "longest"] = Field(
        "score", description="best score first, the same under a cap on similarity, or one of two baselines"
    )
    diversity: DiversityConfig | None = Field(None, description="needed by method: diverse")

    @model_validator(mode="before")
    @classmethod
    def _default_proportion(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("proportion") is None and values.get("count") is None:
            return {**values, "proportion": 0.2}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> SelectionConfig:
        if self.proportion is not None and self.count is not None:
            raise ValueError("give proportion or count, not both")
        if (self.method == "diverse") != (self.diversity is not None):
            raise ValueError("method: diverse and the diversity section go together")
        return self


class ReportConfig(Strict):
    """What the report shows beyond the scores."""

    compare_layouts: bool = Field(False, description="rate a seeded sample of 200 rows in the other layout too")
    examples: int = Field(5, ge=0, le=50, description="examples shown from top, middle and bottom")


class SelectConfig(Strict):
    """Rate instruction data by the model's own uncertainty and keep the best part."""

    PATHS = ("data.paths.*", "models.*.path", "rating.prompts", "select.diversity.encoder")

    data: DataConfig = Field(description="where examples come from")
    models: list[ModelConfig] = Field(min_length=1, description="the models that rate, each on its own")
    rating: RatingConfig = Field(RatingConfig(), description="how examples are rated")  # type: ignore[call-arg]
    select: SelectionConfig = Field(SelectionConfig(proportion=0.2), description="what is kept")  # type: ignore[call-arg]
    report: ReportConfig = Field(ReportConfig(), description="what the report shows")  # type: ignore[call-arg]
    seed: int = Field(0, description="of the random baseline and of the samples in the report")

    @model_validator(mode="after")
    def _consistent(self) -> SelectConfig:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"models[].name must be unique, got {names}")
        weights = self.rating.weights
        if isinstance(weights, list) and len(weights) != len(names):
            raise ValueError(f"rating.weights has {len(weights)} values for {len(names)} models")
        if weights == "repo" and len(names) != 3:
            raise ValueError("rating.weights: repo is defined for exactly three models")
        if self.rating.mode == "repo" and self.rating.num_prompts != self.rating.num_ratings:
            raise ValueError("rating.mode: repo needs num_prompts equal to num_ratings")
        if self.rating.token_prompt >= self.rating.num_prompts:
            raise ValueError("rating.token_prompt must be smaller than rating.num_prompts")
        if self.select.level == "sentence" and len(names) > 1:
            raise ValueError("select.level: sentence is one model's score; with several models use level: model")
        return self

    @property
    def level(self) -> Literal["token", "sentence", "model"]:
        """The level that decides, with the default filled in."""
        return self.select.level or ("sentence" if len(self.models) == 1 else "model")
