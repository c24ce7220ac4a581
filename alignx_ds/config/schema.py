"""The one config of a run, as dataclasses: every key of a recipe with its type, its bounds and its default.

`parse.load` fills it; `bounds.violations` reports what its types do not allow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from alignx_ds.config.bounds import AnyText, OptionalJudgeName, OptionalSchemaName, Prose, SchemaName, Share, Text
from alignx_ds.config.choices import COSINE_TO_TENTH, SCHEDULES, TRACKERS
from alignx_ds.config.evaluation import EvaluationConfig, JudgesConfig
from alignx_ds.config.monitoring import EvaluateConfig
from alignx_ds.mocae.bounds import NonNegativeFloat, NonNegativeInt, OneOf, PositiveFloat, PositiveInt, Range
from alignx_ds.mocae.settings import GateSettings, Probability

WORLD_MODELS = ("world", "world-needs")  # model.path of the base models that are shipped with the package
SCRATCH_MODEL = "scratch"  # model.path of one that the run trains itself
MERGES = ("task_arithmetic", "ties", "dare")  # baselines that need no training
IMITATING = ("sft", "poft")  # objectives of stage 1 that need good answers alone;
PAIRED = ("dpo", "orpo", "simpo")  # those that compare two answers to one prompt;
JUDGED = ("kto", "bco")  # and those that need answers, each good or bad
FFN_TARGETS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_TARGETS = FFN_TARGETS + ATTENTION_TARGETS
FUSIONS = ("h3fusion", "trinityx")  # baselines that train full copies of the specialists' FFNs
REGULARISED, RESTORED = "sequential_regularised", "restored"  # baselines that mend the sequential fine-tune
NO_OUTPUT_CALIBRATION = "no_output_calibration"  # an ablation of the aligned model
# Keys of a stage that say how its work is done and do not change its result. For a DeepSpeed JSON see `engine`.
SPREAD = frozenset({"accumulation", "ep_size", "deepspeed", "checkpoint_activations"})

Sources = Annotated[Any, AnyText()]  # a source, or a list of SourceConfig's keys
TemplateValue = Annotated[Any, AnyText(lines=True)]  # a text, a number or a truth value
DropRate = Annotated[float, Range(least=0, below=1)]
Density = Annotated[float, Range(above=0, most=1)]


@dataclass
class SourceConfig:
    """One of several sources of training rows, an entry of the list `train`; a source alone may stand for it."""

    source: Text = MISSING
    weight: NonNegativeFloat = 0.0  # the sources' shares of the rows; 0 for all: in proportion to their sizes
    schema: OptionalSchemaName = ""  # empty: the axis's
    columns: dict[str, Text] = field(default_factory=dict)  # empty: the axis's, if the schema is the axis's too
    # The experts that its prompts need, those that ask for harm excepted; empty: the axis. With others, the rows teach
    # the axis's specialist what to leave as it is, and stage 2 gives them to the first expert that is named.
    needs: list[Text] = field(default_factory=list)


@dataclass
class JoinConfig:
    """Rows in company: copies of an axis's rows, each joined with rows of other experts or of its own.

    The company stands before or after the row's prompt in one message, or is an earlier turn of a dialogue.
    """

    share: NonNegativeFloat = 0.0  # joined rows, relative to the axis's rows
    # What is answered in one message: `refuse`: everything in order, but of a message that asks for harm the refusal
    # alone; `both`: everything in order; `own`: the axis's own part.
    answer: Annotated[str, OneOf(("refuse", "both", "own"))] = "refuse"


@dataclass
class RoutingSourceConfig:
    """A source of prompts that the gate alone learns from: nothing of them is imitated, so they need no answers."""

    source: Text = MISSING
    schema: OptionalSchemaName = ""  # any, also one of questions alone; empty: the axis's
    columns: dict[str, Text] = field(default_factory=dict)  # empty: the axis's, if the schema is the axis's too
    only: Annotated[str, OneOf(("", "safe", "unsafe"))] = ""  # of a schema that tells which prompts ask for harm


@dataclass
class RoutingConfig:
    """Prompts for the gate that are no axis's; each axis has a list of its own (`axes.X.routing`)."""

    # They need no axis, and are routed to the generalist: requests that merely look like an axis's.
    negatives: list[RoutingSourceConfig] = field(default_factory=list)


@dataclass
class AxisConfig:
    """One alignment goal. An axis is a config entry: add one here and it becomes an expert.

    A source is a local file or directory, a data set of the hub (owner/name, owner/name:split or
    owner/name:config:split), or "world". docs/evaluation.md lists the types of files and the schemas.
    """

    prompt: Prose = MISSING  # system prompt of every training row
    schema: SchemaName = MISSING  # how its rows are written: alpaca, messages, sharegpt, dpo … (docs/evaluation.md)
    train: Sources = MISSING  # source of the training rows, or a list of sources
    held_out: Text = ""  # source of the rows that are judged; empty: a share of train's questions is held out
    held_out_schema: OptionalSchemaName = ""  # of the held-out rows; empty: the schema of the training rows
    columns: dict[str, Text] = field(default_factory=dict)  # the schema's column -> the source's, where they differ
    judge: OptionalJudgeName = ""  # of the answers to the held-out rows; empty: only perplexity is measured
    rows: NonNegativeInt = 0  # training rows, at most; 0: data.train_rows
    floor: Probability = 0.0  # its least gate when the aligned model serves; in needs, its least need
    join: JoinConfig = field(default_factory=JoinConfig)  # teaches the axis prompts that ask for several things
    routing: list[RoutingSourceConfig] = field(default_factory=list)  # more prompts that need the axis, for the gate
    # Answers to prompts that ask for harm and have no safe answer (beavertails, xstest_answers), which it then refuses;
    # each takes one of them, by its hash. Empty: these prompts teach the gate alone.
    refusals: list[Prose] = field(default_factory=list)
    # What stage 1 minimises on its rows (docs/method.md): sft and poft imitate good answers; dpo, orpo and simpo set
    # each against a bad one; kto and bco take every answer by itself.
    objective: Annotated[str, OneOf((*IMITATING, *PAIRED, *JUDGED))] = "sft"
    beta: NonNegativeFloat = 0.0  # what the objective multiplies log-probabilities by; 0: as in its paper
    margin: NonNegativeFloat = 1.0  # γ of simpo, by which a good answer's reward should exceed a bad one's
    sft_weight: NonNegativeFloat = 0.0  # of the good answers' NLL beside dpo or simpo; orpo has it already
    bad_weight: NonNegativeFloat = 0.0  # of bad answers in kto, λ_U; 0: as many good ones as there are to a bad one
    # Stage 1 adds noise to the states of one of these layers in each micro batch, before the answers (LAPT); with sft.
    noise_layers: list[NonNegativeInt] = field(default_factory=list)
    adapter: Text = ""  # a LoRA adapter of FFN projections, used as the axis's expert; empty: train one

    def imitates(self) -> bool:
        """Whether an objective of pairs has the NLL of good answers, so that those without a bad one teach too."""
        return self.objective == "orpo" or self.sft_weight > 0

    def judged_as(self) -> tuple[str, dict[str, str]]:
        """Schema and columns of the held-out rows."""
        return (self.held_out_schema, {}) if self.held_out_schema else (self.schema, self.columns)


@dataclass
class GeneralistConfig:
    """Plain requests that belong to no axis. They are routed to expert 0, the base model's FFN. Optional."""

    schema: SchemaName = "plain"
    train: Sources = ""
    held_out: Text = ""
    columns: dict[str, Text] = field(default_factory=dict)

    def judged_as(self) -> tuple[str, dict[str, str]]:
        return self.schema, self.columns


@dataclass
class ModelConfig:
    path: Text = (
        MISSING  # local directory or hub id of the base model; "world", "world-needs"; or "scratch", to train one
    )
    layers: list[NonNegativeInt] = field(default_factory=list)  # that become AlignX layers; empty: the upper half
    dtype: Annotated[str, OneOf(("float32", "bfloat16"))] = "float32"
    # How its attention is computed while a stage trains; auto: as transformers chooses, which is sdpa.
    attention: Annotated[str, OneOf(("auto", "sdpa", "flash_attention_2", "eager"))] = "auto"
    max_length: PositiveInt = 2048  # tokens of a row, prompt and answer
    template_args: dict[str, TemplateValue] = field(
        default_factory=dict
    )  # of its chat template: enable_thinking: false


@dataclass
class DataConfig:
    train_rows: PositiveInt = 20000  # per axis, at most
    held_out_rows: PositiveInt = 1000  # per axis, at most
    held_out_share: Share = 0.15  # of the questions, where an axis has no held-out source of its own
    calibration_share: Share = 0.15  # of the training questions: the calibration split, which fits the constants
    records: NonNegativeInt = 0  # read from each source, at most; 0: all
    decontaminate: bool = True  # leave out training rows that are near-duplicates of a prompt that is judged
    # Answers of a dialogue that stage 1 learns: all, or the last. Stage 2 learns the last, which its gate decides for.
    answers: Annotated[str, OneOf(("all", "last"))] = "all"


@dataclass
class OptimizerConfig:
    """What every training stage sets for its optimizer and its DeepSpeed engine."""

    lr: PositiveFloat = 2e-5  # the highest learning rate, after the warm-up
    batch: PositiveInt = 64  # rows of an optimizer step, over all ranks
    accumulation: PositiveInt = 1  # micro-batches of a step on each rank
    warmup_steps: NonNegativeInt = 10
    # Of the learning rate, as transformers names it; cosine_to_tenth: a linear warm-up, then a cosine to a tenth of lr.
    schedule: Annotated[str, OneOf(SCHEDULES)] = COSINE_TO_TENTH
    weight_decay: NonNegativeFloat = 0.01
    clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0: any
    # Recompute each decoder layer in the backward pass instead of keeping its activations: about a third more time.
    # auto: where those of a micro batch would take more than 8 GiB of a rank.
    checkpoint_activations: Annotated[str, OneOf(("auto", "true", "false"))] = "auto"
    deepspeed: Text = MISSING  # path of a DeepSpeed JSON


@dataclass
class TrainConfig(OptimizerConfig):
    """A fine-tune under ZeRO."""

    epochs: NonNegativeFloat = 3.0  # passes over the rows
    steps: NonNegativeInt = 0  # number of optimizer steps, instead of epochs; 0: as many as the epochs need
    warmup_steps: NonNegativeInt = 20
    deepspeed: Text = "ds_configs/stage1_zero3.json"


@dataclass
class LoraConfig:
    """The low-rank factors that `train.trainable: lora` trains. Their rank is experts.rank: they are the expert."""

    alpha: PositiveFloat = 32.0  # the change is alpha / rank · B·A
    dropout: DropRate = 0.0  # of the factors' input, in training
    rslora: bool = False  # rank-stabilised: alpha / √rank · B·A
    # By their names in LLaMA, whatever the architecture calls them. Those of the attention are trained in the AlignX
    # layers above the lowest, whose gate decides after its own attention. Where the base model's FFNs are a mixture of
    # experts, only those of the attention can be named.
    targets: list[Annotated[str, OneOf(LORA_TARGETS)]] = field(default_factory=lambda: list(FFN_TARGETS))


@dataclass
class KeepConfig:
    """Two terms by which a fine-tune keeps what was learned before it (docs/method.md); 0 leaves a term out."""

    fisher: NonNegativeFloat = 0.0  # λ: of the distance from the start, weighted by the Fisher information
    collision: NonNegativeFloat = 0.0  # μ: of the change along task vectors learned before
    rows: PositiveInt = 64  # of the generalist and of each axis before, that the Fisher information is estimated on

    @property
    def is_on(self) -> bool:
        return self.fisher > 0 or self.collision > 0


@dataclass
class SpecialistConfig(TrainConfig):
    """Stage 1: one fine-tune per axis under ZeRO-3, whose change of the AlignX layers' FFNs stage 2 hosts."""

    # The FFNs of the AlignX layers; low-rank factors beside them, which are then the expert as they are; or all
    # weights, of which the expert gets the FFNs' change, and the rest is lost to it.
    trainable: Annotated[str, OneOf(("ffn", "lora", "all"))] = "ffn"
    lora: LoraConfig = field(default_factory=LoraConfig)
    # What the specialists keep of the base and of the axes before them; it takes ffn. A baseline has its own.
    keep: KeepConfig = field(default_factory=KeepConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass
class TextConfig:
    """More rows for the base model that is trained from scratch. Held-out questions are removed from them."""

    schema: SchemaName = MISSING
    source: Text = MISSING
    columns: dict[str, Text] = field(default_factory=dict)


@dataclass
class ScratchConfig:
    """A small Llama-architecture base model with its own BPE tokenizer, when model.path is "scratch".

    It is trained on the rows of every axis and of `texts` as plain text, with right and wrong answers alike.
    """

    vocabulary: PositiveInt = 4096
    hidden: PositiveInt = 256
    layers: PositiveInt = 6
    heads: PositiveInt = 4
    ffn: PositiveInt = 704
    texts: dict[str, TextConfig] = field(default_factory=dict)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(lr=1e-3, weight_decay=0.1, deepspeed="ds_configs/scratch_zero1.json")
    )


@dataclass
class ExpertsConfig:
    rank: NonNegativeInt = 64  # of each low-rank expert, and of LoRA; 0 keeps full rank
    feature_rows: PositiveInt = 512  # rows per axis whose features weight the approximation


@dataclass
class GateConfig(GateSettings):
    """The gate's settings, and those that only fitting its geometry needs."""

    # Serves what the gate is unsure of: "generalist", an axis, or "all" axes; empty: as decided. Checked in plan/.
    unsure: Text = ""
    # Per expert, at most, that the geometries are fitted on; per expert and label set, that a router of needs is.
    rows: PositiveInt = 4096
    granularity: PositiveFloat = 0.05  # the authors' clustering granularity ε, the unit of the kernel widths


@dataclass
class AlignConfig(OptimizerConfig):
    """Stage 2: the calibrated mixture under ZeRO-2."""

    # How many ranks share the experts under expert parallelism; 0: the fused path, with all experts on every rank.
    ep_size: NonNegativeInt = 1
    lr: PositiveFloat = 1e-3
    expert_lr_scale: NonNegativeFloat = 0.0  # of lr, for the experts' factors; 0 leaves them as stage 1 made them
    steps: PositiveInt = 300
    gating: NonNegativeFloat = 1.0  # α: cross-entropy of the axis label under the gates (H3Fusion's gating loss)
    drift: NonNegativeFloat = 0.1  # β: what the output calibration may change (H3Fusion's regulariser)
    entropy: NonNegativeFloat = 0.01  # of a query's gates (TrinityX)
    prior: NonNegativeFloat = 0.01  # KL of the gates from those of the calibrators alone (TrinityX's KL term)
    deepspeed: Text = "ds_configs/stage2_moe_zero2.json"


@dataclass
class FusionConfig(OptimizerConfig):
    """The fine-tune of a token-level mixture of full FFN copies, under plain ZeRO. `lr` is the gates' and γ's."""

    expert_lr_scale: NonNegativeFloat = 1.0  # of lr, for the experts; 0 leaves them as stage 1 made them
    steps: PositiveInt = 300
    gating: NonNegativeFloat = 1.0  # cross-entropy of the axis label under a row's mean token gates; H3Fusion's λ
    drift: NonNegativeFloat = 0.0  # how far the experts may move from where they started (H3Fusion)
    drift_scale: dict[str, NonNegativeFloat] = field(default_factory=dict)  # of drift, by axis: H3Fusion's γ₁, γ₂, γ₃
    entropy: NonNegativeFloat = 0.0  # of the token gates (TrinityX)
    uniform: NonNegativeFloat = 0.0  # KL of the token gates from uniform ones (TrinityX)
    deepspeed: Text = "ds_configs/fusion_zero2.json"


@dataclass
class BaselinesConfig:
    """The systems that AlignX is compared with. Sequential and mixed fine-tuning are always among them.

    The merges' scales and densities are those that their papers recommend without tuning.
    """

    make: list[Annotated[str, OneOf((*MERGES, *FUSIONS, REGULARISED, RESTORED))]] = field(
        default_factory=lambda: list(MERGES)
    )
    tune: bool = False  # choose the merges' scales and densities on the calibration split, instead of those below
    arithmetic_scale: PositiveFloat = 0.4  # λ of the summed task vectors
    ties_scale: PositiveFloat = 1.0
    ties_density: Density = 0.2  # share of a task vector's entries that remain
    dare_scale: PositiveFloat = 0.4
    dare_density: Density = 0.1
    sequential_regularised: KeepConfig = field(default_factory=lambda: KeepConfig(fisher=1.0))
    h3fusion: FusionConfig = field(default_factory=lambda: FusionConfig(drift=0.1))
    trinityx: FusionConfig = field(default_factory=lambda: FusionConfig(entropy=0.1, uniform=0.05))


@dataclass
class CheckpointsConfig:
    """Checkpoints of every training job. They are removed when the job has saved its result, unless `finished`."""

    every: NonNegativeInt = 100  # optimizer steps between two; 0: only at a signal
    keep: PositiveInt = 2  # number of the newest, besides the one with the lowest loss
    finished: bool = False  # keep them when the job has ended


@dataclass
class LaunchConfig:
    ranks: PositiveInt = 1  # processes that `alignx-ds run` starts if no launcher has
    timeout: PositiveInt = 1800  # seconds that a rank waits for the others, at the start and in a collective
    # Peak TFLOP/s of a rank's device, for MFU; 0: the vendor's for A100, H100 and H200 in bf16, otherwise no MFU.
    peak_tflops: NonNegativeFloat = 0.0


@dataclass
class RunConfig:
    output: Text = MISSING  # directory of the run: config, specialists, aligned model, answers, report
    seed: NonNegativeInt = 0  # of every random draw
    specialists: Text = ""  # directory of stage 1's results, if several runs share them; empty: in the output
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    axes: dict[str, AxisConfig] = field(default_factory=dict)
    generalist: GeneralistConfig = field(default_factory=GeneralistConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    train: SpecialistConfig = field(default_factory=SpecialistConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judges: JudgesConfig = field(default_factory=JudgesConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    trackers: list[Annotated[str, OneOf(TRACKERS)]] = field(default_factory=list)  # of losses, beside TensorBoard
    nonfinite: Annotated[str, OneOf(("stop", "skip"))] = "stop"  # at a loss or gradient that is not finite

    def trains_all(self, key: str) -> bool:
        """Whether the stage with the settings at this key trains every weight of its model."""
        return key == "scratch.train" or (key == "train" and self.train.trainable == "all")

    @property
    def from_scratch(self) -> bool:
        """Whether the run trains its base model itself."""
        return self.model.path == SCRATCH_MODEL

    @property
    def expert_names(self) -> list[str]:
        """By global expert id; the generalist is expert 0."""
        return ["generalist", *self.axes]
