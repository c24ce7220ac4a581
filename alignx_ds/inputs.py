"""Read, check and encode everything that a run trains on and is judged by, before any process group starts."""

from __future__ import annotations

from dataclasses import dataclass

from alignx_ds.config import AxisConfig, GeneralistConfig, RunConfig
from alignx_ds.data.encode import Example, encode, encode_prompts
from alignx_ds.data.rows import Row, split
from alignx_ds.data.sources import Dataset, load
from alignx_ds.errors import DataError
from alignx_ds.specialists.base import BaseModel
from alignx_ds.training.loop import Rows


@dataclass(frozen=True)
class Inputs:
    """By axis, and for the generalist under "generalist"."""

    injected: dict[str, list[Example]]  # axis's training rows under its own system prompt: stage 1
    train: Rows  # training rows of all experts without any system prompt: stage 2
    kept_back: Rows  # the same of questions that are kept back to fit constants
    held_out: dict[str, list[Row]]  # judged, never trained on
    routed: Rows  # held-out prompts with the expert they belong to
    digests: dict[str, str]


def read(config: RunConfig, base: BaseModel) -> Inputs:
    """Raises DataError naming file, row and column."""
    sources: dict[str, AxisConfig | GeneralistConfig] = {**config.axes, "generalist": config.generalist}
    train: dict[str, Dataset] = {}
    held_out: dict[str, Dataset] = {}
    for name, s in sources.items():
        wanted = (s.rows if isinstance(s, AxisConfig) else 0) or config.data.train_rows
        train[name] = load(s.train, s.schema, held_out=False, limit=wanted, seed=config.seed)
        held_out[name] = load(s.held_out, s.schema, held_out=True, limit=config.data.held_out_rows, seed=config.seed)
        overlap = {r.prompt for r in train[name].rows} & {r.prompt for r in held_out[name].rows}
        if overlap:
            example = sorted(overlap)[0][:60]
            raise DataError(
                f"{s.held_out}: {len(overlap)} questions are in {s.train} too, e.g. {example!r}; remove them"
            )
    limit = config.model.max_length

    def encoded(rows: list[Row], prompt: str | None = None) -> list[Example]:
        return encode(rows, base.tokenizer, prompt, limit)

    kept, back = Rows([], []), Rows([], [])
    for expert, name in enumerate(config.expert_names):
        for target, rows in zip((kept, back), split(train[name].rows, config.data.calibration_share), strict=True):
            target.examples.extend(encoded(rows))
            target.experts.extend([expert] * len(rows))
        for rows_of, what in ((kept, "train"), (back, "calibrate")):
            if expert not in rows_of.experts:
                mend = "give more rows, or change data.calibration_share"
                raise DataError(f"{sources[name].train} ({name}): no row is left to {what} on; {mend}")
    routed = Rows([], [])
    for expert, name in enumerate(config.expert_names):
        prompts = encode_prompts([row.prompt for row in held_out[name].rows], base.tokenizer)
        routed.examples.extend(Example(tuple(ids), len(ids)) for ids in prompts)
        routed.experts.extend([expert] * len(prompts))
    return Inputs(
        injected={name: encoded(train[name].rows, axis.prompt) for name, axis in config.axes.items()},
        train=kept,
        kept_back=back,
        held_out={name: held_out[name].rows for name in config.axes},
        routed=routed,
        digests={name: dataset.digest for name, dataset in train.items()},
    )
