"""Configuration of the `exar` jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stitch_ray.config.base import DataConfig, ModelConfig, Name, Strict
from stitch_ray.config.sample_answers import LabelsConfig


class ExarSplitConfig(Strict):
    """Which questions nobody learns from. By hash of the question, on the same axis as `finetune`'s split."""

    test: float = Field(0.2, ge=0, lt=1, description="share of the questions that is kept for evaluation")
    salt: str = Field("stitch_ray", description="one a project: a question is on the same side in all its jobs")


class ExarMergeConfig(Strict):
    """DATASET+: labelled answers from several temperatures, each once, made ready for training."""

    PATHS = ("answers.*", "held_out_from.*")

    answers: list[str] = Field(min_length=1, description="run folders of `exar label`")
    key: Literal["question_answer", "answer"] = Field(
        "question_answer", description="what is kept once; answer: as published, which loses equal answers to others"
    )
    held_out_from: list[str] = Field(
        [], description="model folders; answers to questions that one of them learned from are dropped"
    )
    balance: Literal["none", "downsample", "weights"] = Field(
        "none", description="train rows: as they are, as many CORRECT as WRONG, or a weight that evens them out"
    )
    gold: bool = Field(False, description="the gold answers as CORRECT rows to learn from, beside the model's own")
    split: ExarSplitConfig = Field(ExarSplitConfig(), description="what is held out")  # type: ignore[call-arg]
    seed: int = Field(0, ge=0, description="of downsampling")


class ExarAdaptersConfig(Strict):
    """LoRA adapters of the model: one answers, one judges."""

    answer: str | None = Field(None, description="adapter that answers; default: the model alone")
    validator: str | None = Field(None, description="adapter that judges; default: whatever answers judges too")
    combine: Literal["switch", "cat"] = Field(
        "switch", description="switch: each in its place; cat: both concatenated to one adapter with both tasks"
    )
    weights: tuple[float, float] = Field((1.0, 1.0), description="cat: of answer and validator")

    @model_validator(mode="after")
    def _both(self) -> ExarAdaptersConfig:
        if self.combine == "cat" and not (self.answer and self.validator):
            raise ValueError("combine: cat needs both adapters, answer and validator")
        if self.combine == "switch" and self.weights != (1.0, 1.0):
            raise ValueError("weights have no effect with combine: switch")
        return self


class ExarValidatorConfig(Strict):
    """Who says whether an answer is right. The last two are controls: they tell what a validator is worth."""

    kind: Literal["model", "scorer", "oracle", "random"] = Field(
        "model", description="P(CORRECT) of a model, a run of train-scorer, the gold answers, or chance"
    )
    model: ModelConfig | None = Field(None, description="kind: model; another model; default: the one that answers")
    scorer: str | None = Field(None, description="kind: scorer; run folder of train-scorer that needs no signals")
    threshold: float = Field(0.5, ge=0, le=1, description="an answer is accepted from this P(CORRECT) on")
    accept: float = Field(0.5, ge=0, le=1, description="kind: random; share of answers that is accepted")

    @model_validator(mode="after")
    def _consistent(self) -> ExarValidatorConfig:
        if self.model is not None and self.kind != "model":
            raise ValueError(f"validator.model has no effect with kind: {self.kind}")
        if (self.kind == "scorer") != (self.scorer is not None):
            raise ValueError("validator.kind: scorer and validator.scorer go together")
        if self.accept != 0.5 and self.kind != "random":
            raise ValueError(f"validator.accept has no effect with kind: {self.kind}")
        return self


class AttemptsConfig(Strict):
    """Generate, validate, exclude, generate again."""

    max_attempts: int = Field(6, ge=1, le=64, description="answers to one question")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        [0.0, 0.2, 0.3, 0.4, 0.5, 0.6], min_length=1, description="of the attempts; the last one goes on"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="of attempts above temperature 0")
    max_tokens: int = Field(64, ge=1, description="longest answer")
    stop: list[str] = Field([], description="strings an answer ends before")
    exclude: Literal["all", "last", "none"] = Field(
        "all", description="which of the answers that were turned down the prompt excludes; last: as published"
    )
    last: Literal["validate", "accept"] = Field(
        "validate", description="the last attempt: judged like any other, or given unjudged (as published)"
    )
    on_cycle: Literal["retry", "stop"] = Field(
        "retry", description="an answer that was turned down before comes again: go on, or give up"
    )


class ExarRefineConfig(Strict):
    """Generate, validate, exclude, generate again, until an answer is accepted; else abstain."""

    PATHS = (
        "data.paths.*",
        "model.path",
        "template",
        "adapters.answer",
        "adapters.validator",
        "validator.model.path",
        "validator.scorer",
        "labels.encoder",
    )

    data: DataConfig = Field(description="questions; their answers are told to nobody but the oracle")
    model: ModelConfig = Field(description="the model that answers, or the base of the adapters")
    template: str = Field("chat", description="chat: the model's own chat template; raw: no markers; or a Jinja file")
    adapters: ExarAdaptersConfig = Field(ExarAdaptersConfig(), description="of the model")  # type: ignore[call-arg]
    validator: ExarValidatorConfig = Field(ExarValidatorConfig(), description="who judges")  # type: ignore[call-arg]
    attempts: AttemptsConfig = Field(AttemptsConfig(), description="how often, how warm")  # type: ignore[call-arg]
    labels: LabelsConfig = Field(LabelsConfig(), description="how right an answer is")  # type: ignore[call-arg]
    questions: Literal["test", "train", "all"] = Field("test", description="which side of the split is asked")
    split: ExarSplitConfig = Field(ExarSplitConfig(), description="what is held out")  # type: ignore[call-arg]
    seed: int = Field(0, ge=0, description="of warm attempts, and of chance")

    @model_validator(mode="after")
    def _consistent(self) -> ExarRefineConfig:
        if self.adapters.validator and (self.validator.kind != "model" or self.validator.model is not None):
            raise ValueError("adapters.validator has no effect: another validator judges")
        if (self.adapters.answer or self.adapters.validator) and self.model.engine != "transformers":
            raise ValueError("adapters need model.engine: transformers; merge them for vllm")
        return self


class ExarEvaluateConfig(Strict):
    """What a refinement is worth, beside majority votes and other choices for the same number of calls."""

    PATHS = ("refine", "controls.*", "samples")

    refine: str = Field(description="run folder of `exar refine`")
    controls: dict[Name, str] = Field({}, description="name -> run of `exar refine` with another validator")
    samples: str | None = Field(None, description="run of sample-answers: independent answers to the same questions")
    trained_on: Literal["refuse", "count"] = Field(
        "refuse", description="questions that a model learned from: an error, or only counted in the report"
    )
    bootstrap: int = Field(1000, ge=0, description="resamples behind the 95 % intervals; 0: no intervals")
    ece_bins: int = Field(15, ge=2, description="bins of the calibration error")
    seed: int = Field(0, ge=0, description="of the bootstrap")


class ExarJudgeConfig(Strict):
    """A validator on labelled answers, such as those that people have judged: how well it tells right from wrong."""

    PATHS = ("answers.*", "model.path", "template")

    answers: list[str] = Field(min_length=1, description="run folders of `exar label`")
    model: ModelConfig = Field(description="the validator")
    template: str = Field("chat", description="chat: the model's own chat template; raw: no markers; or a Jinja file")
    threshold: float = Field(0.5, ge=0, le=1, description="an answer counts as CORRECT from this P(CORRECT) on")
    max_tokens: int = Field(8, ge=1, description="longest reply in words, which is read beside P(CORRECT)")
    bootstrap: int = Field(1000, ge=0, description="resamples of the questions behind the 95 % intervals")
    ece_bins: int = Field(15, ge=2, description="bins of the calibration error")
    seed: int = Field(0, ge=0, description="of the bootstrap")


class ExarChainSplitConfig(Strict):
    """Three sides of the questions, by hash: for stage zero, for DATASET+, and for the evaluation."""

    test: float = Field(0.2, gt=0, lt=1, description="share that no stage learns from; everything is measured on it")
    plus: float = Field(0.4, gt=0, lt=1, description="share whose predictions become DATASET+")
    salt: str = Field("stitch_ray", description="one a project: a question is on the same side in all its jobs")

    @model_validator(mode="after")
    def _something_left(self) -> ExarChainSplitConfig:
        if self.test + self.plus >= 1:
            raise ValueError("split.test and split.plus leave nothing for stage zero")
        return self


class PredictionsConfig(Strict):
    """The answers that DATASET+ is made of: one to a question at every temperature."""

    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [0.1, 0.6, 0.8], min_length=1, description="of the answers"
    )
    top_p: float = Field(0.9, gt=0, le=1, description="of the answers")
    questions: Literal["plus", "all"] = Field(
        "plus", description="all: those of stage zero too, whose answers the model may know by heart"
    )


class RuleConfig(Strict):
    """When an answer is CORRECT; see `exar label`."""

    encoder: str | None = Field(None, description="encoder of BERTScore; default: the rule without it")
    convention: Literal["rouge_101", "rouge_score"] = Field(
        "rouge_101",
        description="of ROUGE-L: as published, with gold answer and answer in each other's place, or as usual",
    )
    rouge_f: float = Field(0.5, ge=0, le=1, description="ROUGE-L F above this")
    bert_with_rouge: float = Field(0.5, ge=0, le=1, description="least BERTScore F beside it")
    rouge_p_or_r: float = Field(0.6, ge=0, le=1, description="or ROUGE-L precision or recall above this")
    bert: float = Field(0.9, ge=0, le=1, description="or BERTScore F above this")


class ExarRunConfig(Strict):
    """The whole chain: stage zero, predictions, labels, DATASET+, validator, EXAR model, refinement, evaluation.

    `stage_zero`, `validator` and `exar` hold keys of `finetune`, model and tasks left out.
    """

    PATHS = ("data.paths.*", "model.path", "rule.encoder", "labels.encoder")

    data: DataConfig = Field(description="questions with their answers")
    model: ModelConfig = Field(description="the model that everything starts from")
    split: ExarChainSplitConfig = Field(ExarChainSplitConfig(), description="three sides")  # type: ignore[call-arg]
    stage_zero: dict[str, Any] | None = Field({}, description="fine-tuning on the questions; null: the model as it is")
    predictions: PredictionsConfig = Field(PredictionsConfig(), description="for DATASET+")  # type: ignore[call-arg]
    rule: RuleConfig = Field(RuleConfig(), description="of the labels")  # type: ignore[call-arg]
    balance: Literal["none", "downsample", "weights"] = Field("weights", description="as in `exar merge`")
    gold: bool = Field(True, description="the validator also learns from the gold answers")
    validator: dict[str, Any] = Field({}, description="fine-tuning of the validator")
    exar: dict[str, Any] = Field({}, description="fine-tuning of the EXAR model")
    replay: bool = Field(True, description="the EXAR model sees the examples of stage zero again")
    attempts: AttemptsConfig = Field(AttemptsConfig(), description="of the refinement")  # type: ignore[call-arg]
    threshold: float = Field(0.5, ge=0, le=1, description="an answer is accepted from this P(CORRECT) on")
    labels: LabelsConfig = Field(LabelsConfig(), description="when a final answer is right")  # type: ignore[call-arg]
    controls: list[Literal["oracle", "random", "always"]] = Field(
        ["oracle", "random", "always"],
        description="validators to compare with: gold answers, chance, yes to everything",
    )
    samples: int = Field(12, ge=1, description="independent answers to a question, for the votes to compare with")
    sample_temperature: float = Field(0.6, gt=0, description="of these")
    seed: int = Field(0, ge=0, description="of everything")
