"""Read, check, split and encode everything that a run trains on and is judged by, before any process group starts.

Every record of every source is accounted for: it is used, or it is dropped with a reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alignx_ds.config.schema import SCRATCH_MODEL, AxisConfig, GeneralistConfig, RunConfig
from alignx_ds.data.batches import Rows
from alignx_ds.data.encode import Example, encode
from alignx_ds.data.files import Placed
from alignx_ds.data.rows import Row, split
from alignx_ds.data.schemas import SCHEMAS, Dropped, Parsed
from alignx_ds.data.sources import Source, digest
from alignx_ds.data.texts import planned, read_texts, train_tokenizer
from alignx_ds.errors import DataError, UnreachableError
from alignx_ds.models.base import BaseModel

HELD_OUT, CALIBRATION = "held out", "calibration"  # salts of the two splits


@dataclass(frozen=True)
class Side:
    """One side of one expert's rows (to train on, or held out), and what became of the records that it came from."""

    source: str
    records: int
    rows: list[Row]
    dropped: list[Dropped]

    def reasons(self) -> Counter[str]:
        return Counter(d.reason for d in self.dropped)

    def without(self, unwanted: dict[int, str]) -> Side:
        """Without the rows at these places in the list, dropped for these reasons."""
        kept = [row for i, row in enumerate(self.rows) if i not in unwanted]
        lost = [Dropped(self.rows[i].place, reason) for i, reason in unwanted.items()]
        return Side(self.source, self.records, kept, [*self.dropped, *lost])

    @classmethod
    def of(cls, source: str, records: list[Placed], parsed: Parsed) -> Side:
        return cls(source, len(records), parsed.rows, parsed.dropped)


@dataclass(frozen=True)
class RowSet:
    """By expert, the generalist first; experts without rows have empty sides. `sets` are the extra evaluation sets."""

    train: dict[str, Side]
    held_out: dict[str, Side]
    sets: dict[str, Side]
    asked: frozenset[str]  # every question that is judged, also of held-out rows beyond the limits: never trained on


@dataclass(frozen=True)
class Inputs:
    """By axis, and for the generalist under "generalist"."""

    rows: RowSet
    injected: dict[str, list[Example]]  # axis's training rows under its own system prompt: stage 1
    train: Rows  # training rows of all experts without any system prompt: stage 2
    calibration_rows: Rows  # the same of questions that are kept back to fit constants
    held_out: dict[str, list[Row]]  # judged, never trained on
    references: Rows  # the held-out rows that have a reference answer, without any system prompt: perplexity
    routed: Rows  # held-out prompts with the expert they belong to
    digests: dict[str, str]


@dataclass(frozen=True)
class Material:
    """What a run is made from, read and checked before any process group starts."""

    base: BaseModel
    data: Inputs
    texts: list[Row]  # what a base model from scratch reads; none for a base model that is there already

    @classmethod
    def of(cls, config: RunConfig, base: BaseModel) -> Material:
        """Raises DataError naming file, row and column, and UnreachableError when the hub keeps the tokenizer."""
        if not base.has_tokenizer and config.model.path != SCRATCH_MODEL:
            raise UnreachableError(
                f"{config.model.path}: the hub can't be reached for its tokenizer; check the network"
            )
        rows = read_rows(config)
        texts: list[Row] = []
        if config.model.path == SCRATCH_MODEL:
            texts = read_texts(config, rows.asked)
            tokenizer = train_tokenizer(texts, config.scratch.vocabulary)
            base = BaseModel(config.model, planned(config, tokenizer))
        return cls(base, encode_rows(config, rows, base.tokenizer), texts)


def read_rows(config: RunConfig) -> RowSet:
    """Every source read, parsed and split by question. Raises DataError naming file, row and column."""
    train, held_out = {}, {}
    for name, settings in _sources(config).items():
        train[name], held_out[name] = _sides(settings, config)
    asked = frozenset(row.question for side in held_out.values() for row in side.rows)
    for name, settings in _sources(config).items():
        seen = {i: "its question is held out" for i, r in enumerate(train[name].rows) if r.question in asked}
        train[name] = _limited(train[name].without(seen), _wanted(settings, config))
        held_out[name] = _limited(held_out[name], config.data.held_out_rows)
        for side, what in ((train[name], "to train on"), (held_out[name], "held out")):
            if side.source and not side.rows:
                raise DataError(f"{side.source} ({name}): no usable row {what}{_because(side)}")
    trained = frozenset(row.question for side in train.values() for row in side.rows)
    sets = {name: _extra_set(name, config, trained) for name in config.evaluation.sets}
    return RowSet(train, held_out, sets, asked | {row.question for side in sets.values() for row in side.rows})


def _sources(config: RunConfig) -> dict[str, AxisConfig | GeneralistConfig]:
    return {"generalist": config.generalist, **config.axes}


def _sides(s: AxisConfig | GeneralistConfig, config: RunConfig) -> tuple[Side, Side]:
    if not s.train:
        return Side("", 0, [], []), Side("", 0, [], [])
    schema = judged_schema = SCHEMAS[s.schema]
    seed, limit = config.seed, config.data.records
    source = Source(s.train, s.schema, s.columns)
    train = source.records(held_out=False, count=_wanted(s, config), seed=seed, limit=limit)
    if s.held_out:
        judged_schema = SCHEMAS[s.judged_as()[0]]
        source = Source(s.held_out, *s.judged_as())
        judged = source.records(held_out=True, count=config.data.held_out_rows, seed=seed, limit=limit)
    else:
        share = config.data.held_out_share
        judged = [p for p in train if Row(schema.question(p[1]), "").position(HELD_OUT) < share]
        train = [p for p in train if Row(schema.question(p[1]), "").position(HELD_OUT) >= share]
    held_out = Side.of(s.held_out or s.train, judged, judged_schema.held_out(judged))
    return Side.of(s.train, train, schema.parse(train)), held_out


def _wanted(s: AxisConfig | GeneralistConfig, config: RunConfig) -> int:
    """Training rows, at most."""
    return (s.rows if isinstance(s, AxisConfig) else 0) or config.data.train_rows


def _limited(side: Side, rows: int) -> Side:
    return side.without(dict.fromkeys(range(rows, len(side.rows)), f"more than {rows} rows"))


def _extra_set(name: str, config: RunConfig, trained: frozenset[str]) -> Side:
    s = config.evaluation.sets[name]
    wanted = s.rows or config.data.held_out_rows
    records = Source(s.source, s.schema, s.columns).records(held_out=True, count=wanted, seed=config.seed)
    side = Side.of(s.source, records, SCHEMAS[s.schema].held_out(records))
    seen = {i: "its question is trained on" for i, row in enumerate(side.rows) if row.question in trained}
    side = _limited(side.without(seen), wanted)
    if not side.rows:
        raise DataError(f"{s.source} ({name}): no usable row{_because(side)}")
    return side


def _because(side: Side) -> str:
    counts = ", ".join(f"{count} × {reason}" for reason, count in side.reasons().most_common())
    return f" of {side.records} records ({counts})" if counts else ": the source is empty"


def encode_rows(config: RunConfig, rows: RowSet, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Token ids of every row, with and without its axis's prompt; rows that are too long are dropped.

    Raises DataError when an axis is left without rows for one of its uses.
    """
    fitted = RowSet(
        {name: _fitting(side, tokenizer, config, _prompt(config, name)) for name, side in rows.train.items()},
        {name: _fitting(side, tokenizer, config, None) for name, side in rows.held_out.items()},
        {name: _fitting(side, tokenizer, config, None, prompts=True) for name, side in rows.sets.items()},
        rows.asked,
    )
    kept, back, references, routed = (Rows([], []) for _ in range(4))
    for expert, name in enumerate(config.expert_names):
        parts = split(fitted.train[name].rows, config.data.calibration_share, CALIBRATION)
        for target, part in zip((kept, back), parts, strict=True):
            _add(target, encode(part, tokenizer), expert)
        judged = encode(fitted.held_out[name].rows, tokenizer)
        _add(references, [e for e in judged if e.answer_length], expert)
        _add(routed, [Example(e.ids[: e.prompt_length], e.prompt_length) for e in judged], expert)
        for target, what in ((kept, "train"), (back, "calibrate")):
            if fitted.train[name].source and expert not in target.experts:
                fix = "give more rows, or change data.calibration_share"
                raise DataError(f"{fitted.train[name].source} ({name}): no row is left to {what} on; {fix}")
    imitated = {a: [r for r in fitted.train[a].rows if r.response] for a in config.axes}
    injected = {a: encode(imitated[a], tokenizer, config.axes[a].prompt) for a in config.axes}
    for axis, examples in injected.items():
        if not examples:
            raise DataError(f"{fitted.train[axis].source} ({axis}): no row has an answer to imitate")
    return Inputs(
        rows=fitted,
        injected=injected,
        train=kept,
        calibration_rows=back,
        held_out={axis: fitted.held_out[axis].rows for axis in config.axes},
        references=references,
        routed=routed,
        digests={name: digest(side.rows) for name, side in fitted.train.items()},
    )


def _prompt(config: RunConfig, name: str) -> str | None:
    return config.axes[name].prompt if name in config.axes else None


def _fitting(
    side: Side, tokenizer: PreTrainedTokenizerBase, config: RunConfig, system: str | None, *, prompts: bool = False
) -> Side:
    """Of rows that are only asked, the prompts have to fit.

    Trained rows have to in both stages: without a system prompt a template may write a longer one of its own.
    """
    limit = config.model.max_length
    lengths = [e.prompt_length if prompts else len(e.ids) for e in encode(side.rows, tokenizer, system)]
    if system:
        lengths = [max(n, len(e.ids)) for n, e in zip(lengths, encode(side.rows, tokenizer), strict=True)]
    long = {i: f"longer than model.max_length={limit} tokens" for i, n in enumerate(lengths) if n > limit}
    fitted = side.without(long)
    if side.rows and not fitted.rows:
        raise DataError(f"{side.source}: all {len(side.rows)} rows are longer than model.max_length={limit}; raise it")
    return fitted


def _add(target: Rows, examples: list[Example], expert: int) -> None:
    target.examples.extend(examples)
    target.experts.extend([expert] * len(examples))
