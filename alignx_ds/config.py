"""The one config of a run: dataclasses, a recipe file and `key=value` overrides, merged by OmegaConf.

`load` reports every problem at once, before any process group starts.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignx_ds.errors import ConfigError, Problem

WORLD_MODEL = "world"  # model.path of the base model that is shipped with the package
QUOTED_NOTHING = "''"  # what `key=` stands for
SCRATCH_MODEL = "scratch"  # model.path of one that the run trains itself
MERGES = ("task_arithmetic", "ties", "dare")  # baselines that need no training
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
class GateConfig:
    scope: str = "shared"  # shared (one decision, made at the lowest AlignX layer) or per_layer
    latent: int = 64  # k, of the gate's whitened latent space
    rows: int = 4096  # per expert, at most, that the geometries are fitted on
    fractal: float = 0.6  # λ₁
    natural: float = 0.4  # λ₂
    lexical: float = 1.0  # λ₃, of the words' own score; 0 is the paper's gate
    temperature: float = 1.0  # of the linear router's softmax
    fractal_dimensions: int = 4  # leading latent dimensions in which the fractal score lives
    anchors: int = 64  # k-means anchors per expert
    granularity: float = 0.05  # ε, the unit of the kernel widths: ε·2, ε·4, …
    scales: int = 5  # how many of them
    output_latent: int = 32  # latent size of the output calibration
    top_k: int = 1  # experts that serve a query; training always mixes all


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
class LaunchConfig:
    ranks: int = 1  # processes that `alignx-ds run` starts when no launcher has


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

    @property
    def expert_names(self) -> list[str]:
        """By global expert id; the generalist is expert 0."""
        return ["generalist", *self.axes]


def load(recipe: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Recipe < overrides, typed and checked for unknown keys, types and missing values. Raises ConfigError with all."""
    values = _read_recipe(Path(recipe))
    problems: list[Problem] = []
    for override in overrides or []:
        _apply_override(values, override, problems)
    typed = OmegaConf.structured(RunConfig)
    for key, value in _leaves(values, RunConfig, "", problems):
        try:
            OmegaConf.update(typed, key, value, force_add=True)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem(key, value, _type_of(key), f"correct the value ({reason})"))
    try:
        problems += [
            Problem(key, None, _type_of(key), "set it in the recipe or on the command line")
            for key in sorted(OmegaConf.missing_keys(typed))
        ]
        if problems:
            raise ConfigError(*problems)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        where = error.full_key or ""
        given: Any = values
        for name in where.split("."):
            given = given.get(name) if isinstance(given, dict) else given
        reason = f"{str(error).splitlines()[0]}; write the value itself"
        raise ConfigError(Problem(where, given, "a value that resolves", reason)) from error
    assert isinstance(config, RunConfig)
    return config


def to_yaml(config: RunConfig) -> str:
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def to_dict(config: RunConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(Problem("recipe", str(path), "a YAML file", "check the path; recipes are in launch/recipes"))
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(Problem("recipe", str(path), "valid YAML", reason)) from error
    if not isinstance(values, dict):
        raise ConfigError(Problem("recipe", str(path), "a YAML mapping", "write it as `key: value` lines"))
    return {str(key): value for key, value in values.items()}


def _apply_override(values: dict[str, Any], override: str, problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(Problem("command line", override, "key=value", "write it as train.lr=1e-3"))
        return
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text or QUOTED_NOTHING}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problems.append(Problem(key, text, "a YAML value", " ".join(str(error).split())))
        return
    assert isinstance(value, dict)
    node = values
    *parents, last = key.split(".")
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    node[last] = value["value"]


def _leaves(values: dict[str, Any], kind: type, prefix: str, problems: list[Problem]) -> list[tuple[str, Any]]:
    """(dotted key, value) of every known leaf, and before those of a mapping's entry a blank one to fill in.

    Unknown keys become problems.
    """
    hints = get_type_hints(kind)
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        key, hint = f"{prefix}{name}", hints.get(str(name))
        if hint is None:
            close = difflib.get_close_matches(str(name), hints, n=1)
            mend = f"did you mean '{prefix}{close[0]}'?" if close else "remove it"
            problems.append(Problem(key, value, f"a known key ({', '.join(f.name for f in fields(kind))})", mend))
        elif is_dataclass(hint) and isinstance(hint, type):
            leaves += _nested(value, hint, key, problems)
        elif get_origin(hint) is dict:
            inner: Any = get_args(hint)[1]
            if not isinstance(value, dict):
                problems.append(Problem(key, value, "a mapping", f"give one {inner.__name__} per name"))
                continue
            for entry_name, entry in value.items():
                place = f"{key}.{entry_name}"
                if inner is str:
                    leaves.append((place, entry))
                    continue
                if isinstance(entry, dict):
                    leaves.append((place, inner()))
                leaves += _nested(entry, inner, place, problems)
        else:
            leaves.append((key, value))
    return leaves


def _nested(value: Any, kind: type, key: str, problems: list[Problem]) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return _leaves({str(k): v for k, v in value.items()}, kind, f"{key}.", problems)
    problems.append(Problem(key, value, "a mapping", f"give its keys: {', '.join(f.name for f in fields(kind))}"))
    return []


def _type_of(key: str) -> str:
    kind: Any = RunConfig
    for name in key.split("."):
        kind = get_args(kind)[1] if get_origin(kind) is dict else get_type_hints(kind).get(name, Any)
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
