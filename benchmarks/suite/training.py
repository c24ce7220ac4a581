"""The training steps of both stages with the project's own engines, on random weights and random rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from alignx_ds.config.schema import AlignConfig, RunConfig, TrainConfig
from alignx_ds.data.batches import MicroBatch, collate
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.mocae.layer import freeze_trunk
from alignx_ds.runtime import distributed, memory
from alignx_ds.runtime.console import Progress
from alignx_ds.stages import align
from alignx_ds.stages.activations import recompute
from alignx_ds.training import engine as engines
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.loop import StepLoss, micro_batches, train
from alignx_ds.training.losses import forward_nll
from alignx_ds.training.speed import own_tokens
from suite.systems import AXES, Setting, alignx
from suite.timing import WARM_UP

PAD, SEED, ENDLESS = 0, 0, 100_000  # steps: more than any benchmark takes
EXPERTS = AXES + 1  # and the generalist
ROWS = "random tokens; length uniform on [L/4, L], prompt uniform on [1/4, 3/4] of it, expert uniform"


def ep_sizes(world: int) -> list[int]:
    """The numbers of ranks over which the experts can be spread in a world of this size."""
    return [n for n in range(1, EXPERTS + 1) if EXPERTS % n == 0 and world % n == 0]


LEARNED = 0.5  # of the tokens of random rows, on average: a prompt is a quarter to three quarters of its row


def random_rows(count: int, vocabulary: int, length: int, seed: int = SEED) -> LabelledExamples:
    """As `ROWS` says, of greatest length L."""
    source = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=source))

    examples = []
    for _ in range(count):
        size = draw(max(4, length // 4), length)
        ids = torch.randint(3, vocabulary, (size,), generator=source).tolist()
        examples.append(Example(tuple(ids), draw(size // 4, 3 * size // 4)))
    return LabelledExamples(examples, [draw(0, EXPERTS - 1) for _ in range(count)])


@dataclass
class Trainee:
    """An engine, its loss, and its endless stream of this rank's micro batches."""

    engine: Any
    plan: engines.Plan
    step_loss: StepLoss
    rows: LabelledExamples
    packed: bool
    deepspeed: dict[str, Any]  # the filled JSON
    zero3: Any = None  # while it is alive, transformers shards the models that it makes

    def stream(self) -> Iterator[list[MicroBatch]]:
        return micro_batches(self.rows, self.plan, PAD, SEED, packed=self.packed)

    def steps(self, stream: Iterator[list[MicroBatch]], count: int) -> list[float | None]:
        """Run `count` optimizer steps of the project's training loop."""
        job = TrainingJob("benchmark")
        return train(self.engine, lambda start: islice(stream, count), self.step_loss, self.plan, Progress(), job)

    def with_batch(self, batch: int) -> Trainee:
        """The same engine with another batch size; the sizes in its JSON matter to DeepSpeed's reports only."""
        return replace(self, plan=replace(self.plan, batch=batch))

    def alone(self, count: int) -> Callable[[], None]:
        """A forward and a backward pass of the first `count` rows, the same on every rank, without communication.

        All ranks begin at once, and it ends with the last one.
        """
        model = self.engine.module.train()
        b = collate(self.rows.examples[:count], PAD).to(distributed.device())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        inputs = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "prompt_mask": b.prompt_mask}

        def run() -> None:
            distributed.barrier()
            torch.autograd.grad(forward_nll(model, b, use_cache=False, **inputs), trained, allow_unused=True)
            distributed.barrier()

        return run

    def close(self) -> None:
        engines.end(self.engine)
        self.engine = self.zero3 = None
        memory.free()


def bare_loop(engine: Any, steps: Iterable[list[MicroBatch]]) -> None:
    """Stage 1 without anything but forward, with the model's own loss, backward and step."""
    for step in steps:
        for part in step:
            b = part.batch
            where = {"attention_mask": b.attention_mask} if b.position_ids is None else {"position_ids": b.position_ids}
            output = engine(input_ids=b.input_ids, labels=b.labels, use_cache=False, **where)
            engine.backward(output.loss)
            engine.step()


def by_round(steps: list[list[MicroBatch]], of_round: int) -> list[int]:
    """Real tokens, without padding, of each timed round of so many steps, over all ranks. Collective."""
    own = [sum(own_tokens(step) for step in steps[i : i + of_round]) for i in range(0, len(steps), of_round)][WARM_UP:]
    return [sum(of_ranks) for of_ranks in zip(*distributed.gather(own), strict=True)]


def here(setting: Setting) -> Setting:
    """The setting on this rank's own device."""
    return replace(setting, device=str(distributed.device()))


def stage1(setting: Setting, rows: LabelledExamples, batch: int, zero: int, *, packed: bool = True) -> Trainee:
    """A specialist's fine-tune, from stage 1's JSON with this ZeRO stage."""
    config = TrainConfig(batch=batch)
    template = engines.read_template(config.deepspeed, "train.deepspeed")
    template["zero_optimization"]["stage"] = zero
    return fine_tune(setting, rows, config, template, packed=packed)


def fine_tune(
    setting: Setting, rows: LabelledExamples, config: TrainConfig, template: dict[str, Any], *, packed: bool = True
) -> Trainee:
    """Stage 1 with these settings, and a DeepSpeed JSON: the upper half's FFNs."""
    from alignx_ds.training.losses import language_loss

    plan = plan_of(config, setting)
    filled = engines.fill(template, plan, distributed.world_size(), setting.config.hidden_size)
    zero3 = HfDeepSpeedConfig(filled)
    model = specialist(setting)
    if config.checkpoint_activations == "true":
        recompute(model)
    engine = engines.start(model, engines.decay_groups(list(model.named_parameters()), plan.weight_decay), filled, plan)
    return Trainee(engine, plan, language_loss, rows, packed, filled, zero3)


def specialist(setting: Setting) -> PreTrainedModel:
    """A model that stage 1 trains: the upper half's FFNs. The weights are the same at every call."""
    torch.manual_seed(SEED)
    with torch.device(setting.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(setting.config, dtype=setting.dtype)
    table, layers = backbone_of(setting.config.model_type), setting.config.num_hidden_layers
    trained = {table.weight_name(layer, p) for layer in range(layers // 2, layers) for p in PROJECTIONS}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def stage2(setting: Setting, rows: LabelledExamples, batch: int, ep_size: int, expert_lr_scale: float = 0.1) -> Trainee:
    """The calibrated mixture: the project's own groups, losses and JSON; with ep_size 0 on the fused path."""
    config = AlignConfig(ep_size=ep_size, batch=batch, expert_lr_scale=expert_lr_scale)
    return mixture(setting, rows, config, engines.read_template(config.deepspeed, "align.deepspeed"))


def mixture(setting: Setting, rows: LabelledExamples, config: AlignConfig, template: dict[str, Any]) -> Trainee:
    """Stage 2 with these settings, and a DeepSpeed JSON: every layer is an AlignX layer."""
    run, plan = RunConfig(align=config), plan_of(config, setting)
    filled = engines.fill(template, plan, distributed.world_size(), setting.config.hidden_size)
    torch.manual_seed(SEED)
    model = alignx(setting, placement=align.placement(config.ep_size))  # whole: the engine shards it under ZeRO-3
    align.mix_outputs(model)
    freeze_trunk(model, experts=config.expert_lr_scale > 0)
    align.make_expert_groups(config.ep_size)
    if config.checkpoint_activations == "true":
        recompute(model)
    engine = engines.start(model, align.parameter_groups(model, run), filled, plan)
    return Trainee(engine, plan, align.step_loss(run), rows, False, filled)


def plan_of(config: TrainConfig | AlignConfig, setting: Setting) -> engines.Plan:
    return engines.Plan.of(config, "bfloat16" if setting.dtype == torch.bfloat16 else "float32", ENDLESS)
