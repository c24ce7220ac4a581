"""Fit the calibrators of the aligned model to its features, before stage 2 trains it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from alignx_ds.data.encode import LabelledExamples, pad_token
from alignx_ds.data.labels import LabelSet, source_quotas
from alignx_ds.data.user_turn import user_turn
from alignx_ds.errors import DataError
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.routing.fit_geometry import Features, collect, fit
from alignx_ds.routing.fit_lexicon import fit_lexicon
from alignx_ds.routing.fit_router import fit_router, router_rows
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed, memory
from alignx_ds.stages.assembly import ExpertFactors, FittedCalibrators, assemble
from alignx_ds.stages.stage import StageContext

FILE = "fitted.safetensors"
Collected = tuple[dict[int, Features], dict[int, Features]]  # of the gates and of the mixtures, by decoder layer


def fit_calibrators(context: StageContext, factors: ExpertFactors) -> FittedCalibrators:
    """Fit on rank 0, to features of training rows and of the calibration split, and send to all ranks. Collective."""
    fitted = _fit_geometries(context, factors)
    return replace(fitted, routers=_fit_routers(context, factors, fitted))


def _fit_geometries(context: StageContext, factors: ExpertFactors) -> FittedCalibrators:
    c, data = context.config, context.data
    seen, unseen = _features(context, factors)

    def geometries(kind: int, latent: int) -> dict[int, Geometry]:
        return {
            layer: fit(features, unseen[kind][layer], latent, c.gate, c.expert_names, c.seed)
            for layer, features in seen[kind].items()
        }

    fitted = FittedCalibrators({}, {}, {})
    if distributed.is_main():
        turn = user_turn(context.base.tokenizer)
        lexicon = fit_lexicon(data.train, data.calibration_rows, len(c.expert_names), turn)
        fitted = FittedCalibrators(geometries(0, c.gate.latent), geometries(1, c.gate.output_latent), lexicon)
    return distributed.broadcast(fitted)


def _features(context: StageContext, factors: ExpertFactors) -> tuple[Collected, Collected]:
    """Those of training rows and those of the calibration split. Nothing of the model is left in memory."""
    c, data = context.config, context.data
    model = assemble(c, context.base, factors, None, None).to(distributed.device())
    seen, unseen = (
        collect(model, rows, pad_token(context.base.tokenizer), c.evaluation.batch)
        for rows in (first_of_each_expert(data.train, c.gate.rows), first_of_each_expert(data.calibration_rows))
    )
    del model
    memory.free()
    return seen, unseen


def _fit_routers(
    context: StageContext, factors: ExpertFactors, fitted: FittedCalibrators
) -> dict[int, dict[str, Tensor]]:
    """The states of the linear routers, by the gates' layers, fitted beside the calibrators."""
    c, data = context.config, context.data
    model = assemble(c, context.base, factors, fitted, None).to(distributed.device())
    seen, unseen = (
        router_rows(model, rows, pad_token(context.base.tokenizer), c.evaluation.batch)
        for rows in (first_of_each_set(data.train, c.gate.rows), data.calibration_rows)
    )
    del model
    memory.free()
    routers: dict[int, dict[str, Tensor]] = {}
    if distributed.is_main():
        for layer, rows in seen.items():
            routers[layer] = fit_router(rows, unseen[layer], fitted.gates[layer].present, c.gate)
    return distributed.broadcast(routers)


def first_of_each_expert(rows: LabelledExamples, count: int = 0) -> LabelledExamples:
    """Each expert's first `count` rows (0: all) that need it and no other, or fewer.

    A geometry needs no more, and each row costs a forward pass. Rows that need several experts lie between these: with
    them, the geometries of the experts would be hard to tell apart. Of an expert with several sources, as many of each
    as the root of its size.
    """
    return _first(rows, [i for i, needed in enumerate(rows.needs) if needed == (rows.experts[i],)], count)


def first_of_each_set(rows: LabelledExamples, count: int) -> LabelledExamples:
    """Each expert's first `count` rows of every label set that its rows have, or fewer; sources as above."""
    return _first(rows, range(len(rows.needs)), count)


def _first(rows: LabelledExamples, candidates: Sequence[int], count: int) -> LabelledExamples:
    """Of the candidates, by their places, the first `count` (0: all) of each expert and label set."""
    sizes = Counter((rows.experts[i], rows.needs[i], rows.sources[i]) for i in candidates)
    left: dict[tuple[int, LabelSet, int], int] = {}
    for group in sorted({key[:2] for key in sizes}):
        own = [key for key in sizes if key[:2] == group]
        counts = [sizes[key] for key in own]
        left |= zip(own, source_quotas(counts, count or sum(counts)), strict=True)
    chosen = LabelledExamples([], [])
    for i in candidates:
        key = (rows.experts[i], rows.needs[i], rows.sources[i])
        if left[key]:
            chosen.add([rows.examples[i]], rows.experts[i], [rows.needs[i]], [rows.sources[i]])
            left[key] -= 1
    return chosen


def saved_calibrators(
    context: StageContext, factors: ExpertFactors, directory: Path, inputs: dict[str, Any]
) -> tuple[FittedCalibrators, dict[str, str]]:
    """(calibrators, hashes of their files): read from `directory` when they were fitted from `inputs`, or fitted anew.

    A stage that resumes must read them, because another number of ranks would round them otherwise. Collective.
    """

    def is_current() -> bool:
        try:
            return manifest.is_current(directory, inputs)
        except DataError as damage:
            console.warn(f"{str(damage).split(';')[0]}: the calibrators are fitted again")
            return False

    def write(fitted: FittedCalibrators) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(fitted.tensors(), directory / FILE)
        manifest.write(directory, inputs, {})

    if distributed.on_main(is_current):
        fitted = FittedCalibrators.from_tensors(load_file(directory / FILE))
    else:
        fitted = fit_calibrators(context, factors)
        distributed.on_main(partial(write, fitted))
    return fitted, distributed.on_main(lambda: manifest.read(directory)["files"])
