"""The small jobs that ranks and tests both work on: rows, configs and the pure-torch run that is their oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from direct_figures import direct_figures
from safetensors.torch import save_file
from stage_contexts import stage_context
from tiny_models import (
    ALIGNX_LAYERS,
    EXPERTS,
    TABLE,
    VOCABULARY,
    aligned,
    base_model,
    generator,
    low_rank_experts,
    padded,
    random_changes,
    random_rows,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedTokenizerFast
from whole_logits import answer_nll

from alignx_ds.config.evaluation import EvaluationConfig
from alignx_ds.config.schema import (
    AlignConfig,
    AxisConfig,
    BaselinesConfig,
    ExpertsConfig,
    FusionConfig,
    GateConfig,
    ModelConfig,
    RunConfig,
    SpecialistConfig,
)
from alignx_ds.data.batches import Batch, collate
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.sampling import global_batches, share
from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.mocae.layer import freeze_trunk
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import signals
from alignx_ds.stages.stage import StageContext
from alignx_ds.training import engine
from alignx_ds.training.losses import align_terms

PAD, SEED = 0, 3
Penalty = Callable[[list[nn.Parameter]], Tensor]
NAMES = ["generalist", "a", "b", "c"]

# Execution parity: (top_k, training).
MODES = {"top1": (1, False), "top2": (2, False), "dense": (1, True)}
PARITY_ROWS = random_rows([5, 11, 3, 8, 14, 2, 9, 6], seed=21)

# Forced experts of the same rows, in the order of the ranks' shares.
IMBALANCED = {
    "all to one": [1] * 8,
    "a rank to one": [3, 3, 3, 3, 0, 1, 2, 0],
    "each rank to another's": [2, 2, 3, 3, 0, 0, 1, 1],
}

# Generation in step: the prompts of each rank, as many and as long as no other's, and how answers are looked for.
PROMPT_ROWS = [random_rows(lengths, 60 + n) for n, lengths in enumerate([[3, 9, 5], [12], [2, 4], [7, 1, 6, 3]])]
ENDS = [14, 37]  # one rank is done at once, another later, the others never
DECODING: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "without a cache": {"use_cache": False}}

# Training: eight rows, four a step.
PROMPTS = [4, 2, 6, 3, 4, 2, 6, 3]
EXAMPLES = [Example(tuple(r), p) for r, p in zip(random_rows([9, 5, 14, 7, 6, 12, 8, 10], 31), PROMPTS, strict=True)]
LABELS = [3, 3, 0, 1, 2, 1, 0, 3]
STAGE_ROWS = LabelledExamples(
    [Example(tuple(r), len(r) - 2) for r in random_rows([7, 9, 5, 11] * 7, 51)],
    [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 1, 2, 3, 3] * 2,
)  # every expert's rows fall to every rank
CALIBRATION_ROWS = LabelledExamples(
    [Example(tuple(r), len(r) - 2) for r in random_rows([8, 6, 10, 5] * 3, 52)], [0, 1, 2, 3, 1, 0, 3, 2, 0, 1, 2, 3]
)
VARIANTS = {  # by world size: optimizer, whether the true expert is forced or the experts frozen, ep_size, accumulation
    1: ["sgd ep1 acc1", "sgd ep1 acc2", "adamw ep1 acc1", "sgd forced ep1 acc1", "adamw ep0 acc1"],
    2: [
        "sgd ep0 acc1",
        "sgd ep0 acc2",
        "adamw ep0 acc1",
        "sgd frozen ep0 acc1",
        "sgd forced ep0 acc1",
        "sgd ep1 acc1",
        "sgd ep2 acc1",
        "sgd ep2 acc2",
        "adamw ep1 acc1",
        "adamw ep2 acc1",
        "sgd frozen ep2 acc1",
        "sgd forced ep1 acc1",
        "sgd forced ep2 acc1",
    ],
    4: ["sgd ep2 acc1", "sgd ep4 acc1", "sgd forced ep2 acc1"],
}


def align_config(ep_size: int, accumulation: int, expert_lr_scale: float = 0.5) -> RunConfig:
    stage = AlignConfig(
        ep_size=ep_size, lr=0.05, expert_lr_scale=expert_lr_scale, batch=4, accumulation=accumulation, steps=3,
        warmup_steps=2, weight_decay=0.1, clip=0.5, gating=1.0, drift=0.5, entropy=0.1, prior=0.1,
    )  # fmt: skip
    return RunConfig(seed=SEED, align=stage)


def fine_tune_config(base: Path, lr: float = 0.01, dtype: str = "float32") -> RunConfig:
    return RunConfig(
        seed=SEED,
        model=ModelConfig(path=str(base), layers=ALIGNX_LAYERS, dtype=dtype),
        axes={"a": AxisConfig(prompt="p"), "b": AxisConfig(prompt="q")},
        train=SpecialistConfig(lr=lr, batch=4, steps=3, warmup_steps=2, weight_decay=0.1, clip=0.5),
        experts=ExpertsConfig(rank=4, feature_rows=6),
    )


def fusion_config(base: Path, accumulation: int) -> RunConfig:
    """All terms weigh in both fusions; the experts of one learn, those of the other do not."""
    stage = FusionConfig(
        lr=0.05, expert_lr_scale=0.5, batch=4, accumulation=accumulation, steps=3, warmup_steps=2,
        weight_decay=0.1, clip=0.5, gating=1.0, drift=5.0, entropy=0.3, uniform=0.1,
        deepspeed=str(base.with_name("sgd.json")),
    )  # fmt: skip
    return RunConfig(
        seed=SEED,
        model=ModelConfig(path=str(base), layers=ALIGNX_LAYERS),
        baselines=BaselinesConfig(h3fusion=stage, trinityx=replace(stage, expert_lr_scale=0.0)),
    )


def write_specialists(root: Path) -> list[Path]:
    """Directories of three specialists with random full-rank task vectors, and two DeepSpeed JSONs.

    The fusions' optimizer is SGD, whose step shows the gradient's scale, which Adam's hides. Stage 2's under ZeRO-3
    shards every parameter, however small.
    """
    sharded = engine.read_template("ds_configs/stage1_zero3.json", "")
    sharded["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (root / "zero3.json").write_text(json.dumps(sharded))
    template = engine.read_template("ds_configs/fusion_zero2.json", "")
    template["optimizer"] = {"type": "SGD", "params": {"lr": "auto", "weight_decay": "auto"}}
    (root / "sgd.json").write_text(json.dumps(template))
    changes = random_changes(base_model())
    directories = [root / f"specialist{n}" for n in range(EXPERTS - 1)]
    for number, directory in enumerate(directories):
        directory.mkdir(exist_ok=True)
        for layer in ALIGNX_LAYERS:
            vectors = {f"task_vector.{p}": changes[layer][number][p] for p in PROJECTIONS}
            save_file(vectors, directory / f"layer_{layer:03d}.safetensors")
        manifest.write(directory, {"number": number}, {})
    return directories


def whole_stage_config(base: Path, how: str) -> RunConfig:
    """`how` is the ep_size, e.g. "ep2"; "ep0 zero3" shards the trunk."""
    ep_size, zero = int(how[2]), {"deepspeed": str(base.with_name("zero3.json"))} if "zero3" in how else {}
    stage = AlignConfig(ep_size=ep_size, lr=0.01, expert_lr_scale=0.5, batch=4, steps=2, warmup_steps=1, **zero)
    return RunConfig(
        seed=SEED,
        model=ModelConfig(path=str(base), layers=ALIGNX_LAYERS),
        axes={name: AxisConfig(prompt=name) for name in ("a", "b", "c")},
        gate=GateConfig(latent=4, fractal_dimensions=3, anchors=4, granularity=0.2, scales=3, output_latent=5),
        align=stage,
        evaluation=EvaluationConfig(batch=3),
    )


def fine_tune_context(root: Path, name: str, lr: float = 0.01) -> StageContext:
    """Two axes with the same rows in opposite order; the fine-tunes lie in this folder of the root."""
    out = Outputs(root / name, root / name)
    injected = {"a": EXAMPLES, "b": EXAMPLES[::-1]}
    return stage_context(fine_tune_config(root / "base", lr), out, injected=injected)


@contextmanager
def stopped_after_two_steps() -> Iterator[None]:
    """A request to stop, which a job of three steps sees after its second."""
    calls = iter([False, True])
    signals.stop_requested, asked = lambda: next(calls), signals.stop_requested
    try:
        yield
    finally:
        signals.stop_requested = asked


def fusion_context(root: Path, name: str, accumulation: int) -> StageContext:
    out, rows = Outputs(root / name, root), LabelledExamples(EXAMPLES, LABELS)
    return stage_context(fusion_config(root / "base", accumulation), out, rows)


def write_base(directory: Path) -> None:
    """The tiny base model with a tokenizer whose words are the token ids."""
    base_model().save_pretrained(directory)
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(directory)


def mixture(
    top_k: int = 1, placement: Placement | None = None, trained: bool = True, *, frozen: bool = False
) -> AlignXForCausalLM:
    base = base_model()
    experts = low_rank_experts(base)
    made = aligned(base, experts, scope="per_layer", top_k=top_k, placement=placement, trained=trained)
    freeze_trunk(made, experts=not frozen)
    return made


def uneven_mixture(kind: str, combine: str, placement: Placement | None) -> AlignXForCausalLM:
    """Its specialists' ranks differ from one projection to the next, so that the fused path pads its stacks.

    In needs, two of them also change projections of the attention.
    """
    base = base_model()
    ranks = {"gate": 1, "up": 3, "down": 2}
    experts = {
        layer: [Factors({p: f.down[p][:r] for p, r in ranks.items()}, {p: f.up[p][:, :r] for p, r in ranks.items()})
                for f in factors]
        for layer, factors in low_rank_experts(base).items()
    }  # fmt: skip
    source, upper = generator(5), max(experts)
    for number, p in ((0, "q"), (1, "q"), (1, "v")) if kind == "needs" else ():
        linear, rank = TABLE.linear(base, upper, p), 1 + number
        experts[upper][number].down[p] = 0.3 * torch.randn(rank, linear.in_features, generator=source)
        experts[upper][number].up[p] = 0.3 * torch.randn(linear.out_features, rank, generator=source)
    made = aligned(base, experts, kind=kind, combine=combine, placement=placement)
    freeze_trunk(made)
    return made


def generated(model: AlignXForCausalLM, rows: list[list[int]], decoding: str) -> list[list[int]]:
    """The answers to these prompts, each up to its end; at most 12 tokens."""
    ids, mask = padded(rows, side="left")
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": PAD}
    made = model.generate(ids, attention_mask=mask, **settings, **DECODING[decoding])
    answers = [row[ids.shape[1] :].tolist() for row in made]
    ends = [next((n for n, token in enumerate(a, start=1) if token in ENDS), len(a)) for a in answers]
    return [a[:end] for a, end in zip(answers, ends, strict=True)]


def cotangents() -> list[Tensor]:
    source = generator(41)
    return [torch.randn(len(row), VOCABULARY, generator=source) for row in PARITY_ROWS]


def dense_parameters(model: AlignXForCausalLM) -> dict[str, Tensor]:
    """Routers and calibrations, which every rank has."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and ".mixture." not in n}


def fused_parameters(model: AlignXForCausalLM) -> dict[str, Tensor]:
    """Everything that stage 2 trains, of a model on the fused path."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def schedule(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


Step = list[tuple[Batch, Tensor, Tensor, float]]


def imbalanced_steps(world: int, rank: int, accumulation: int) -> list[Step]:
    """Rows in their order: the first share of a step belongs to one expert only.

    A part is (batch, experts, needs, lm_scale).
    """
    steps = []
    for chosen in (range(4), range(4, 8), range(4)):
        answers = sum(EXAMPLES[i].answer_length for i in chosen)
        own = list(chosen)[rank * 4 // world : (rank + 1) * 4 // world]
        size = len(own) // accumulation
        parts = [own[i : i + size] for i in range(0, len(own), size)]
        steps.append([_part(p, world * accumulation / answers) for p in parts])
    return steps


def _part(chosen: list[int], scale: float) -> tuple[Batch, Tensor, Tensor, float]:
    labels = torch.tensor([LABELS[i] for i in chosen])
    return collate([EXAMPLES[i] for i in chosen], PAD), labels, one_hot(labels, EXPERTS).float(), scale


def _clip_and_step(optimizer: torch.optim.Optimizer, parameters: list[Any], clip: float, rate: float) -> float:
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    for group in optimizer.param_groups:
        group["lr"] = group["initial"] * rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def align_in_plain_torch(kind: str, forced: bool = False, frozen: bool = False) -> dict[str, Any]:
    """Stage 2 on the fused path with torch's own optimizer: what every placement must give."""
    c = align_config(1, 1).align
    model = mixture(frozen=frozen).train()
    parameters = fused_parameters(model)
    shared = [p for n, p in parameters.items() if ".mixture." not in n]
    groups = [
        {"params": [p for p in shared if p.dim() > 1], "initial": c.lr, "weight_decay": c.weight_decay},
        {"params": [p for p in shared if p.dim() <= 1], "initial": c.lr, "weight_decay": 0.0},
        {
            "params": [p for n, p in parameters.items() if ".mixture." in n],
            "initial": c.lr * c.expert_lr_scale,
            "weight_decay": 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    optimizer = torch.optim.SGD(groups, lr=0.0) if kind == "sgd" else torch.optim.AdamW(groups, betas=(0.9, 0.95))
    steps: list[Step] = imbalanced_steps(1, 0, 1)
    if not forced:
        steps = [
            [_part(chosen, 1 / sum(EXAMPLES[i].answer_length for i in chosen))]
            for chosen in global_batches(len(EXAMPLES), c.batch, c.steps, SEED)
        ]
    losses, norms, curves = [], [], []
    for number, [(b, experts, needs, scale)] in enumerate(steps):
        overruled = one_hot(experts, EXPERTS).float() if forced else None
        logits = model(b.input_ids, b.attention_mask, b.prompt_mask, forced=overruled, use_cache=False).logits
        gates = [d.probabilities().tolist() for d in model.routing.decisions.values()]
        curves.append(direct_figures(gates, experts.tolist(), NAMES))
        loss = align_terms(model, answer_nll(logits, b.labels), needs, scale).total(c)
        loss.backward()
        losses.append(float(loss.detach()))
        rate = schedule(number, c.warmup_steps, c.steps)
        norms.append(_clip_and_step(optimizer, list(parameters.values()), c.clip, rate))
    weights = {n: p.detach() for n, p in parameters.items()}
    return {"losses": losses, "norms": norms, "curves": curves, "weights": weights}


def step_tokens(step: int, rank: int, world: int) -> int:
    """Of the rows that a rank works on in a step, pads apart."""
    c = align_config(1, 1).align
    chosen = list(global_batches(len(EXAMPLES), c.batch, c.steps, SEED))[step]
    return sum(len(EXAMPLES[i].ids) for i in share(chosen, rank, world))


def no_penalty(weights: list[nn.Parameter]) -> Tensor:
    return torch.zeros(())


def ffn_weights(model: nn.Module) -> list[nn.Parameter]:
    """Those of the AlignX layers, layer by layer."""
    views = [TABLE.view(TABLE.ffn_of(model, i)) for i in ALIGNX_LAYERS]
    return [view.projection(p).weight for view in views for p in PROJECTIONS]


def fine_tune_in_plain_torch(
    model: nn.Module | None = None, penalty: Penalty = no_penalty, *, whole: bool = False
) -> dict[str, Any]:
    """Stage 1 with torch's own AdamW on the AlignX layers' FFNs: losses, without the penalty, and task vectors.

    `whole`: on all weights, of which vectors have no weight decay.
    """
    c = fine_tune_config(Path()).train
    model, before = (model or base_model()).train(), base_model()
    views = {i: TABLE.view(TABLE.ffn_of(model, i)) for i in ALIGNX_LAYERS}
    model.requires_grad_(False)
    weights = [weight.requires_grad_() for weight in (model.parameters() if whole else ffn_weights(model))]
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "initial": c.lr, "weight_decay": c.weight_decay},
        {"params": [w for w in weights if w.dim() == 1], "initial": c.lr, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for number, chosen in enumerate(global_batches(len(EXAMPLES), c.batch, c.steps, SEED)):
        b, _, _, scale = _part(chosen, 1 / sum(EXAMPLES[i].answer_length for i in chosen))
        loss = answer_nll(model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits, b.labels) * scale
        (loss + penalty(weights)).backward()
        losses.append(float(loss.detach()))
        _clip_and_step(optimizer, weights, c.clip, schedule(number, c.warmup_steps, c.steps))
    original = {i: TABLE.view(TABLE.ffn_of(before, i)) for i in ALIGNX_LAYERS}
    vectors = {
        i: {p: (views[i].projection(p).weight - original[i].projection(p).weight).detach() for p in PROJECTIONS}
        for i in ALIGNX_LAYERS
    }
    return {"losses": losses, "vectors": vectors, "model": model}
