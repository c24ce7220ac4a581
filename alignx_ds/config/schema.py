"""The one config of a run, as dataclasses: every key of a recipe, its type and its default. `parse.load` fills it."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from alignx_ds.mocae.settings import GateSettings

WORLD_MODEL = "world"  # model.path of the base model that is shipped with the package
SCRATCH_MODEL = "scratch"  # model.path of one that the run trains itself
MERGES = ("task_arithmetic", "ties", "dare")  # baselines that need no training
ANY_TIME = frozenset({"output", "launch", "checkpoints", "nonfinite"})  # may change while a run is under way
# Of a stage: how its work is spread over ranks, not what comes out. Of the DeepSpeed JSON, `engine.settings_of` knows.
SPREAD = frozenset({"accumulation", "ep_size", "deepspeed"})
FUSIONS = ("h3fusion", "trinityx")  # baselines that train full copies of the specialists' FFNs


@dataclass
class AxisConfig:
    """One alignment goal. An axis is a config entry: add one here and it becomes an expert.

    A source is a local file (.json, .jsonl, .csv, .parquet), a data set of the hub (owner/name, owner/name:split or
    owner/name:config:split), or "world".
    """

    prompt: str = MISSING  # system prompt injected into every training row
    schema: str = MISSING  # how its rows are written: alpaca, beavertails, truthfulqa, preference or plain
    train: str = MISSING  # source of the training rows
    held_out: str = ""  # source of the rows that are judged; empty: a share of train's questions, never trained on
    held_out_schema: str = ""  # how those are written; empty: as the training rows
    columns: dict[str, str] = field(default_factory=dict)  # the schema's column -> the source's, where they differ
    judge: str = ""  # who judges the answers to the held-out rows; empty: perplexity is all that is measured
    rows: int = 0  # training rows, at most; 0: data.train_rows
    adapter: str = ""  # a LoRA adapter of FFN projections that is the axis's expert as it is; empty: train one

    def judged_as(self) -> tuple[str, dict[str, str]]:
        """Schema and columns of the held-out rows."""
        return (self.held_out_schema, {}) if self.held_out_schema else (self.schema, self.columns)


@dataclass
class GeneralistConfig:
    """Plain requests that no axis claims; they go to expert 0, the base model's own FFN. Without rows, nothing does."""

    schema: str = "plain"
    train: str = ""
    held_out: str = ""
    columns: dict[str, str] = field(default_factory=dict)

    def judged_as(self) -> tuple[str, dict[str, str]]:
        return self.schema, self.columns


@dataclass
class ModelConfig:
    path: str = MISSING  # local directory or hub id of the base model, "world", or "scratch" to train one (see scratch)
    layers: list[int] = field(default_factory=list)  # decoder layers that become AlignX layers; empty: the upper half
    dtype: str = "float32"  # float32 or bfloat16
    max_length: int = 2048  # tokens of a row, prompt and answer


@dataclass
class DataConfig:
    train_rows: int = 20000  # per axis, at most
    held_out_rows: int = 1000  # per axis, at most
    held_out_share: float = 0.15  # of the questions, where an axis has no held-out source of its own
    calibration_share: float = 0.15  # share of the training questions kept back to fit the calibrators' constants
    records: int = 0  # read no more of any one source; 0: all


@dataclass
class TrainConfig:
    """Stage 1: one fine-tune per axis under ZeRO-3, of the AlignX layers' FFNs: what stage 2 hosts, nothing else."""

    lr: float = 2e-5
    batch: int = 64  # rows of an optimizer step, over all ranks
    accumulation: int = 1
    epochs: float = 3.0  # passes over the rows
    steps: int = 0  # instead of epochs: so many optimizer steps, however many rows there are
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip: float = 1.0
    deepspeed: str = "ds_configs/stage1_zero3.json"


@dataclass
class TextConfig:
    """More rows for the base model that is trained from scratch; their held-out questions are left out."""

    schema: str = MISSING
    source: str = MISSING
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class ScratchConfig:
    """A small Llama-architecture base model with its own BPE tokenizer, when model.path is "scratch".

    It learns the training rows of every axis as plain text, right and wrong answers alike, and those of `texts`.
    """

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    ffn: int = 704
    texts: dict[str, TextConfig] = field(default_factory=dict)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(lr=1e-3, weight_decay=0.1, deepspeed="ds_configs/scratch_zero1.json")
    )


@dataclass
class ExpertsConfig:
    rank: int = 64  # of each low-rank expert; 0 keeps full rank
    feature_rows: int = 512  # rows per axis whose features weigh the approximation


@dataclass
class GateConfig(GateSettings):
    """The gate's settings, and those that only fitting its geometry needs."""

    rows: int = 4096  # per expert, at most, that the geometries are fitted on
    granularity: float = 0.05  # ε, the unit of the kernel widths


@dataclass
class AlignConfig:
    """Stage 2: the calibrated mixture under ZeRO-2 and expert parallelism."""

    ep_size: int = 1
    lr: float = 1e-3
    expert_lr_scale: float = 0.0  # of lr, for the experts' factors; 0 leaves them as stage 1 made them
    batch: int = 64
    accumulation: int = 1
    steps: int = 300
    warmup_steps: int = 10
    weight_decay: float = 0.01
    clip: float = 1.0
    gating: float = 1.0  # α: cross-entropy of the axis label under the gates (H3Fusion's gating loss)
    drift: float = 0.1  # β: what the output calibration may change (H3Fusion's regulariser)
    entropy: float = 0.01  # of a query's gates (TrinityX)
    prior: float = 0.01  # KL of the gates from what the calibrators alone would say (TrinityX's KL term)
    deepspeed: str = "ds_configs/stage2_moe_zero2.json"


@dataclass
class FusionConfig:
    """The fine-tune of a token-level mixture of full FFN copies, under plain ZeRO."""

    lr: float = 2e-5  # of the gates (and of TrinityX's γ)
    expert_lr_scale: float = 1.0  # of lr, for the experts; 0 leaves them as stage 1 made them
    batch: int = 64
    accumulation: int = 1
    steps: int = 300
    warmup_steps: int = 10
    weight_decay: float = 0.01
    clip: float = 1.0
    gating: float = 1.0  # α: cross-entropy of the axis label under a row's mean token gates
    drift: float = 0.0  # how far the experts may move from where they started (H3Fusion)
    entropy: float = 0.0  # of the token gates (TrinityX)
    uniform: float = 0.0  # KL of the token gates from uniform ones (TrinityX)
    deepspeed: str = "ds_configs/fusion_zero2.json"


@dataclass
class BaselinesConfig:
    """What AlignX is compared with, beside sequential and mixed fine-tuning, which are always made.

    The merges' scales and densities are those that their papers recommend where nothing can be tuned.
    """

    make: list[str] = field(default_factory=lambda: list(MERGES))  # of task_arithmetic, ties, dare, h3fusion, trinityx
    arithmetic_scale: float = 0.4  # λ of the summed task vectors
    ties_scale: float = 1.0
    ties_density: float = 0.2  # share of a task vector's entries that are kept
    dare_scale: float = 0.4
    dare_density: float = 0.1
    h3fusion: FusionConfig = field(default_factory=lambda: FusionConfig(drift=0.1))
    trinityx: FusionConfig = field(default_factory=lambda: FusionConfig(entropy=0.1, uniform=0.05))


@dataclass
class SetConfig:
    """Another set of questions that every system answers: XSTest, HoneSet, AlpacaEval, multiple choice …"""

    schema: str = MISSING
    source: str = MISSING
    judge: str = MISSING
    columns: dict[str, str] = field(default_factory=dict)
    rows: int = 0  # at most; 0: data.held_out_rows


@dataclass
class EvaluationConfig:
    batch: int = 64  # prompts decoded together
    max_new_tokens: int = 256
    compile: bool = False  # the decode step with torch.compile: pays where many batches are decoded
    sets: dict[str, SetConfig] = field(default_factory=dict)


@dataclass
class JudgesConfig:
    """What the judges need; only what a recipe's judges use is looked at."""

    endpoint: str = ""  # of an OpenAI-compatible server, e.g. http://localhost:8000/v1; its key is OPENAI_API_KEY
    endpoint_model: str = ""  # the model that it is asked for
    endpoint_parallel: int = 8  # requests under way at a time
    reference: str = ""  # alpaca_eval's: a JSON list of instruction, output, generator; empty: the rows' own
    moderation: str = "PKU-Alignment/beaver-dam-7b"  # directory or hub id, as the three below
    guard: str = "meta-llama/Llama-Guard-3-8B"
    truth: str = "allenai/truthfulqa-truth-judge-llama2-7B"
    info: str = "allenai/truthfulqa-info-judge-llama2-7B"
    classifier_rows: str = ""  # BeaverTails rows that the offline safety judge learns from; its questions are split
    classifier_held_out: float = 0.15  # share of those questions that it never learns from, and is measured on
    batch: int = 8  # answers that a local judge model reads together


@dataclass
class CheckpointsConfig:
    """Of every training job. A job that has ended leaves its result, so its checkpoints go, unless they are to stay."""

    every: int = 100  # optimizer steps from one to the next; 0: only when a signal asks for one
    keep: int = 2  # the newest so many, and beside them the one with the lowest loss
    finished: bool = False  # keep them when their job has ended


@dataclass
class LaunchConfig:
    ranks: int = 1  # processes that `alignx-ds run` starts when no launcher has
    timeout: int = 1800  # seconds that a rank waits for the others, at the start and in a collective


@dataclass
class RunConfig:
    output: str = MISSING
    seed: int = 0
    specialists: str = ""  # directory of stage 1's results; empty: inside the output. Point it elsewhere to share them
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    axes: dict[str, AxisConfig] = field(default_factory=dict)
    generalist: GeneralistConfig = field(default_factory=GeneralistConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judges: JudgesConfig = field(default_factory=JudgesConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    nonfinite: str = "stop"  # what a loss or gradient that is NaN or infinite does: stop, or skip its step

    @property
    def expert_names(self) -> list[str]:
        """By global expert id; the generalist is expert 0."""
        return ["generalist", *self.axes]
