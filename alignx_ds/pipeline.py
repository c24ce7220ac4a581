"""The main job, from top to bottom as it runs: the work of `alignx-ds run`, `align` and `specialists`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from alignx_ds.config.schema import SCRATCH_MODEL, RunConfig
from alignx_ds.data.inputs import RunInputs, read_inputs
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation import report
from alignx_ds.evaluation.best_of_run import BestOfRun
from alignx_ds.evaluation.compared import Trained, ablated_systems, compared_systems, load_aligned, served_systems
from alignx_ds.evaluation.evaluate import Evaluation
from alignx_ds.evaluation.tuned_merges import tuned
from alignx_ds.plan import capacity, checks, training
from alignx_ds.plan.accounts import accounts, notes
from alignx_ds.plan.dry_run import describe, lengths_of
from alignx_ds.plan.gpu_memory import problems
from alignx_ds.plan.prompts import facts
from alignx_ds.plan.sizes import disk
from alignx_ds.routing.router_report import router_report
from alignx_ds.runs import outputs
from alignx_ds.runtime import console, distributed, launcher, signals
from alignx_ds.stages import align, finetune, fuse, restore, results, scratch
from alignx_ds.stages.stage import StageContext

Until = Literal["specialists", "align", "run"]


def run(
    config: RunConfig,
    given: Sequence[str],
    *,
    until: Until = "run",
    dry_run: bool = False,
    show_config: bool = False,
    gpu_memory: float | None = None,
) -> int:
    """Train, compare and report what the config describes; returns the exit code.

    `given`: the recipe and the overrides that the config was read from, which the ranks read again.

    Every step reuses what an earlier start of the same run has finished in the output directory. `until` names the
    last step: stage 1 ("specialists"), stage 2 ("align"), or the report ("run"). `dry_run` checks all that can be
    checked without reading weights, prints the plan (after the resolved config, with `show_config`) and writes nothing.
    With `gpu_memory`, bytes of a GPU, stages that would not fit are refused.

    Raises ConfigError or DataError for what the user can fix, and Stopped when a signal has asked for the end.
    """
    # Check: nothing is written before everything is known to be usable.
    if not dry_run:
        distributed.start_failure_detection(config.launch.timeout)
    world_size = distributed.planned_world_size(config.launch.ranks)
    base = checks.check(config, world_size, weights=not dry_run)
    if not dry_run:
        outputs.Outputs.of(config).lock.check()
    outputs.check_owner(config)
    if until == "run" and distributed.is_main():
        served_systems(config)
    if dry_run:
        plan, too_large = describe(
            config, base, world_size, show_config=show_config, until=until, gpu_memory=gpu_memory
        )
        print(plan)
        _refuse(too_large)
        return 0
    outputs.check_room(config, sum(disk(config, base).values()))

    # Read the data: every rank reads all of it. What this process has encoded, its ranks do not encode again.
    inputs = read_inputs(config, base)
    base, data = inputs.base, inputs.data
    if gpu_memory is not None:
        _refuse(problems(config, base, lengths_of(data), world_size, gpu_memory, until))
    context = StageContext(config, base, data, outputs.Outputs.of(config))
    results.check(context, inputs.texts, baselines=until == "run")

    # Launch the ranks, unless a launcher has started this process.
    if not distributed.under_launcher() and config.launch.ranks > 1:
        with inputs.encodings.shared():
            return launcher.start_ranks([until, *given], config.launch.ranks)
    capacity.check(config, base, world_size, until)  # here: to ask a GPU for its memory takes some of it

    with context.out.lock as lock:
        with _process_group(config.launch.timeout):
            started, ranks = time.monotonic(), distributed.world_size()
            distributed.on_main(lock.take)
            distributed.on_main(lambda: outputs.claim(config))
            _say_what_is_used(config, inputs, ranks)

            if config.model.path == SCRATCH_MODEL:
                console.heading("Base model from scratch")
                scratch.train_base(context, inputs.texts)

            console.heading("Stage 1: specialists")
            specialists = finetune.train_specialists(context)
            if until == "specialists":
                return 0

            console.heading("Stage 2: mixture of calibrated experts")
            aligned = align.train_aligned(context, specialists)
            if until == "align":
                return 0

            console.heading("Baselines")
            fine_tunes = finetune.train_baselines(context)
            fine_tunes |= restore.restored(context, fine_tunes[finetune.SEQUENTIAL], specialists)
            fusions = fuse.train_fusions(context, specialists)

            console.heading("Evaluation")
            if config.baselines.tune:
                chosen = tuned(config, base, data, list(specialists.values()))
                config = replace(config, baselines=chosen)
            compared = compared_systems(config, base, Trained(specialists, fine_tunes, fusions, aligned))
            systems = compared + ablated_systems(config, base, aligned)
            served = distributed.on_main(lambda: served_systems(config))
            if served:
                console.say(f"answers from {config.evaluation.endpoint}: {', '.join(sorted(served))}")
            evaluation = Evaluation(config, base, data, context.out, served)
            evaluation.evaluate_all(systems)
            best_of = BestOfRun(evaluation, [compared[0], compared[-1]]) if config.evaluation.best_of else None
            if best_of:
                best_of.draw()
            router = router_report(load_aligned(base, aligned), data, base, config)

        # A server's answers and judgement, on rank 0 alone: hours, in which no rank should wait in a collective.
        if distributed.is_main():
            with signals.immediate_stop("answers"):  # saved as they come, like verdicts
                evaluation.ask_all(systems)
            with signals.immediate_stop("judgement"):  # verdicts are saved as they come
                judged = evaluation.judge_all(systems)
                best = best_of.choose() if best_of else {}
                seconds = time.monotonic() - started
                found = report.build(config, data, judged, router, context.out, seconds, ranks, best)
                report.write(found, context.out)
                report.show(found, context.out)
    return 0


def _refuse(found: Iterable[Problem]) -> None:
    if too_large := list(found):
        raise ConfigError(*too_large)


@contextmanager
def _process_group(timeout: int) -> Iterator[None]:
    """Within it all ranks work together, and a signal asks them to save their state and end."""
    distributed.init_process_group(timeout)
    with signals.graceful_stop():
        try:
            yield
        finally:
            distributed.shutdown()


def _say_what_is_used(config: RunConfig, inputs: RunInputs, ranks: int) -> None:
    """Print the counts of the rows, how prompts are written and answers end, and settings without an effect."""
    if ranks == 1 < config.launch.ranks:
        console.note(f"a launcher's WORLD_SIZE=1 is set, so launch.ranks={config.launch.ranks} has no effect")
    console.heading("Rows")
    for line in (*accounts(inputs.data.splits, inputs.data.joined), *notes(config, inputs.data)):
        console.say(line)
    for name, fact in facts(inputs.base).items():
        console.say(f"{name}: {fact}")
    for line in training.without_effect(config):
        console.say(line)
