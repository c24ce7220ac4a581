"""Everything that a run is made from, read, checked and encoded before any process group starts.

The flow: sources -> schemas -> splits -> token ids -> the run's inputs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from alignx_ds.config.schema import SCRATCH_MODEL, RunConfig
from alignx_ds.config.sources import training_sources
from alignx_ds.data.compared import ComparedRows, compared_rows
from alignx_ds.data.encode import Example, LabelledExamples, digest
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.join import Joiner
from alignx_ds.data.labels import known_set, label_set
from alignx_ds.data.rows import Dropped, Row, split_by_question
from alignx_ds.data.split_rows import SplitRows, TooLong, Use
from alignx_ds.data.splits import DataSplits, Sources, limited, read_sources
from alignx_ds.data.texts import planned, read_texts, train_tokenizer
from alignx_ds.errors import DataError, UnreachableError
from alignx_ds.models.base import BaseModel

# Fields of EncodedData that nothing is trained or fitted on.
HELD_OUT = ("held_out", "references", "routed", "routing", "sets")
LENT = 1000  # the first number of the sources whose rows belong to another expert than their axis
INJECTED, COMPARED = "injected ", "compared "  # before an axis's name, in `digests`
CALIBRATION = "calibration"  # the salt of the hash that cuts the calibration split off the training rows
EVALUATED = "evaluated"  # that of the hash by which stage 1's evaluation takes some of that split


@dataclass(frozen=True)
class JoinedRows:
    """The joined rows of an axis (`axes.X.join`): those to train on, those for the calibration split, the others."""

    train: list[Row]
    calibration: list[Row]
    dropped: list[Dropped]

    @property
    def rows(self) -> list[Row]:
        return [*self.train, *self.calibration]

    def reasons(self) -> Counter[str]:
        return Counter(d.reason for d in self.dropped)


NOTHING_JOINED = JoinedRows([], [], [])


@dataclass(frozen=True)
class EncodedData:
    """The splits, and their token ids for each use. Axes are keyed by name; every expert has its number."""

    splits: DataSplits
    injected: dict[str, list[Example]]  # stage 1: an axis's training rows, with its system prompt
    train: LabelledExamples  # stage 2: the training rows of all experts, without any system prompt
    calibration_rows: LabelledExamples  # the calibration split, encoded like `train`: constants are fitted on it
    held_out: dict[str, list[Row]]  # judged, never trained on
    references: LabelledExamples  # held-out rows with a reference answer, without any system prompt: perplexity
    routed: LabelledExamples  # held-out prompts alone: the router is measured on them
    routing: dict[str, LabelledExamples] = field(default_factory=dict)  # held-out prompts by source of routing rows
    sets: dict[str, LabelledExamples] = field(default_factory=dict)  # by extra set: prompts whose needs are known
    joined: dict[str, JoinedRows] = field(default_factory=dict)  # by axis that has some
    compared: dict[str, ComparedRows] = field(default_factory=dict)  # by axis whose objective needs bad answers too
    # What stage 1 is evaluated on while it trains, like `injected` and `compared`; empty without `train.evaluate`.
    evaluated: dict[str, list[Example]] = field(default_factory=dict)
    evaluated_compared: dict[str, ComparedRows] = field(default_factory=dict)

    def taught(self, axis: str) -> LabelledExamples:
        """What stage 1 trains the axis's specialist on, for its objective."""
        if axis in self.compared:
            return self.compared[axis].examples
        return LabelledExamples(self.injected[axis], [0] * len(self.injected[axis]))

    @cached_property
    def digests(self) -> dict[str, str]:
        """Hashes of what is trained and fitted on: the rows of stage 2 by field, of the axes with system prompts."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in HELD_OUT}
        stage2 = {name: rows.digest for name, rows in named.items() if isinstance(rows, LabelledExamples)}
        compared = {f"{COMPARED}{axis}": rows.digest for axis, rows in self.compared.items()}
        return stage2 | compared | {f"{INJECTED}{axis}": digest(examples) for axis, examples in self.injected.items()}


@dataclass(frozen=True)
class RunInputs:
    base: BaseModel
    data: EncodedData
    texts: list[Row]  # what a base model from scratch is trained on; empty for a pretrained base model
    encodings: Encodings  # of all rows


def read_inputs(config: RunConfig, base: BaseModel) -> RunInputs:
    """Raises DataError naming file, row and column, and UnreachableError when the hub's tokenizer can't be fetched."""
    from_scratch = config.model.path == SCRATCH_MODEL
    if not base.has_tokenizer and not from_scratch:
        raise UnreachableError(f"{config.model.path}: the hub can't be reached for its tokenizer; check the network")
    sources = read_sources(config)
    texts: list[Row] = []
    if from_scratch:
        texts = read_texts(config, limited(sources, config).judges)
        tokenizer = train_tokenizer(texts, config.scratch.vocabulary)
        base = BaseModel(config.model, planned(config, tokenizer))
    encodings = Encodings(base.tokenizer)
    return RunInputs(base, encode_splits(config, sources, encodings), texts, encodings)


def encode_splits(config: RunConfig, sources: Sources, encodings: Encodings) -> EncodedData:
    """Token ids of every row, with and without its axis's prompt; rows that are too long are dropped.

    Raises DataError when an axis is left without rows for one of its uses.
    """
    too_long = too_long_rows(config, encodings)
    splits = limited(sources, config, too_long)
    joined = _joined_rows(config, splits, too_long)
    train, calibration = _training_examples(config, splits, joined, encodings)
    taught = {axis: taught_rows(config, splits.train[axis]) for axis in config.axes}
    evaluated = _evaluated_rows(config, splits, joined)
    references, routed = LabelledExamples([], []), LabelledExamples([], [])
    for expert, name in enumerate(config.expert_names):
        examples = encodings.encode(splits.held_out[name].rows)
        needs = [label_set(row, config.expert_names, expert) for row in splits.held_out[name].rows]
        answered = [(e, needed) for e, needed in zip(examples, needs, strict=True) if e.answer_length]
        references.add([e for e, _ in answered], expert, [needed for _, needed in answered])
        routed.add([e.prompt() for e in examples], expert, needs)
    return EncodedData(
        splits=splits,
        injected=_injected_examples(config, taught, joined, encodings),
        train=train,
        calibration_rows=calibration,
        held_out={axis: splits.held_out[axis].rows for axis in config.axes},
        references=references,
        routed=routed,
        routing=_add_routing(config, splits, encodings, train, calibration),
        sets=_known_sets(config, splits, encodings),
        joined=joined,
        compared=compared_rows(config, taught, encodings),
        evaluated=_injected_examples(config, evaluated, {}, encodings),
        evaluated_compared=compared_rows(config, evaluated, encodings),
    )


def _cut(config: RunConfig, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(to train on, the calibration split) of training rows."""
    return split_by_question(rows, config.data.calibration_share, CALIBRATION)


def _joined_rows(config: RunConfig, splits: DataSplits, too_long: TooLong) -> dict[str, JoinedRows]:
    """By axis, its joined rows; each is made of rows to train on alone, or of rows of the calibration split alone."""
    cut = {name: _cut(config, split.rows) for name, split in splits.train.items()}
    joiners = [Joiner({name: parts[i] for name, parts in cut.items()}, config.seed) for i in (0, 1)]
    found = {}
    for axis, settings in config.axes.items():
        made = [joiner.joined(axis, rows, settings.join) for joiner, rows in zip(joiners, cut[axis], strict=True)]
        checked = [list(zip(rows, too_long("train", axis, rows), strict=True)) for rows in made]
        train, calibration = ([row for row, reason in rows if not reason] for rows in checked)
        dropped = [Dropped(row.place, reason) for rows in checked for row, reason in rows if reason]
        if any(made):
            found[axis] = JoinedRows(train, calibration, dropped)
    return found


def _add_routing(
    config: RunConfig,
    splits: DataSplits,
    encodings: Encodings,
    train: LabelledExamples,
    calibration: LabelledExamples,
) -> dict[str, LabelledExamples]:
    """Append the routing rows to what the gate is fitted on; returns the held-out ones by source."""
    held_out: dict[str, LabelledExamples] = {}
    for part in splits.routing:
        owner = config.expert_names.index(part.owner)
        parts = _cut(config, part.train.rows)
        measured = held_out[part.name] = LabelledExamples([], [])
        for target, rows in zip((train, calibration, measured), (*parts, part.held_out.rows), strict=True):
            _add(target, rows, owner, config, encodings)
    return {name: rows for name, rows in held_out.items() if rows.examples}


def _known_sets(config: RunConfig, splits: DataSplits, encodings: Encodings) -> dict[str, LabelledExamples]:
    """The prompts of the extra sets whose needs are known. A set without any is left out."""
    found = {}
    for name, settings in config.evaluation.sets.items():
        rows = [(row, known_set(row, settings.needs, config.expert_names)) for row in splits.sets[name].rows]
        known = [(row, needed) for row, needed in rows if needed is not None]
        if known:
            examples = [example.prompt() for example in encodings.encode([row for row, _ in known])]
            needs = [needed for _, needed in known]
            found[name] = LabelledExamples(examples, [needed[0] for needed in needs], needs)
    return found


def _add(target: LabelledExamples, rows: list[Row], owner: int, config: RunConfig, encodings: Encodings) -> None:
    needs = [label_set(row, config.expert_names, owner) for row in rows]
    target.add(encodings.encode(rows), owner, needs, [row.source for row in rows])


def _training_examples(
    config: RunConfig, splits: DataSplits, joined: dict[str, JoinedRows], encodings: Encodings
) -> tuple[LabelledExamples, LabelledExamples]:
    """All experts' training rows, without any system prompt: (to train on, the calibration split)."""
    train, calibration = LabelledExamples([], []), LabelledExamples([], [])
    for expert, name in enumerate(config.expert_names):
        source = splits.train[name].source
        parts, made = _cut(config, splits.train[name].rows), joined.get(name, NOTHING_JOINED)
        company = made.train, made.calibration
        for target, rows, more, use in zip((train, calibration), parts, company, ("train", "calibrate"), strict=True):
            own, lent = _lent(config, name, rows)
            _add(target, [*own, *more], expert, config, encodings)
            for owner, others in lent.items():
                _add(target, others, config.expert_names.index(owner), config, encodings)
            if source and not own:
                fix = "give more rows, or change data.calibration_share"
                raise DataError(f"{source} ({name}): no row is left to {use} on; {fix}")
    return train, calibration


def _lent(config: RunConfig, name: str, rows: list[Row]) -> tuple[list[Row], dict[str, list[Row]]]:
    """The rows of an expert, and by name those of another one: of a source whose prompts don't need this expert."""
    settings = config.generalist if name == "generalist" else config.axes[name]
    sources = training_sources(settings)
    own: list[Row] = []
    lent: dict[str, list[Row]] = {}
    for row in rows:
        needs = [] if row.harmful else sources[row.source].needs
        if not needs or name in needs:
            own.append(row)
        else:
            number = LENT + config.expert_names.index(name) * len(sources) + row.source  # no source of the owner's
            lent.setdefault(needs[0], []).append(replace(row, source=number))
    return own, lent


def _injected_examples(
    config: RunConfig, rows: dict[str, SplitRows], joined: dict[str, JoinedRows], encodings: Encodings
) -> dict[str, list[Example]]:
    """Each axis's rows that have an answer, then the joined rows that it trains on, with the axis's system prompt."""
    injected = {}
    for axis, split in rows.items():
        answered = [row for row in split.rows if row.response]
        if not answered:
            raise DataError(f"{split.source} ({axis}): no row has an answer to imitate; give rows with one")
        every, made = config.data.answers == "all", joined.get(axis, NOTHING_JOINED)
        answered += made.train if config.train.evaluate.every else made.rows
        injected[axis] = encodings.encode(answered, config.axes[axis].prompt, every_answer=every)
    return injected


def taught_rows(config: RunConfig, split: SplitRows) -> SplitRows:
    """The rows of an axis that stage 1 trains on: all, or those that are not in the calibration split."""
    return replace(split, rows=_cut(config, split.rows)[0]) if config.train.evaluate.every else split


def _evaluated_rows(config: RunConfig, splits: DataSplits, joined: dict[str, JoinedRows]) -> dict[str, SplitRows]:
    """By axis, the first rows of its calibration split, in the order of a hash; nothing without `train.evaluate`."""
    found = {}
    for axis in config.axes if config.train.evaluate.every else ():
        split = splits.train[axis]
        rows = [*_cut(config, split.rows)[1], *joined.get(axis, NOTHING_JOINED).calibration]
        usable = sorted((row for row in rows if row.response or row.worse), key=lambda row: row.position(EVALUATED))
        source = f"{split.source}, calibration split"
        found[axis] = replace(split, source=source, rows=usable[: config.train.evaluate.rows])
    return found


def unlearned_answers(config: RunConfig, data: EncodedData) -> dict[str, int]:
    """By axis: the dialogues whose earlier answers stage 1 should learn and can't, because of the chat template."""
    if config.data.answers != "all":
        return {}
    found = {}
    for axis, examples in data.injected.items():
        rows = (row for row in taught_rows(config, data.splits.train[axis]).rows if row.response)
        dialogues = [any(turn.role == "assistant" and turn.learned for turn in row.before) for row in rows]
        found[axis] = sum(d and not e.earlier for d, e in zip(dialogues, examples, strict=False))  # joined rows follow
    return {axis: count for axis, count in found.items() if count}


def too_long_rows(config: RunConfig, encodings: Encodings) -> TooLong:
    """Training rows have to fit with and without their system prompt: without one, a template may add a longer default.

    Of the extra sets' rows and of routing rows only the prompts have to fit.
    """
    limit, every = config.model.max_length, config.data.answers == "all"

    def reasons(use: Use, name: str, rows: list[Row]) -> list[str]:
        examples = encodings.encode(rows)
        lengths = [e.prompt_length if use in ("set", "routing") else len(e.ids) for e in examples]
        if use == "train" and name in config.axes and config.axes[name].prompt:
            injected = encodings.encode(rows, config.axes[name].prompt, every_answer=every)
            lengths = [max(plain, len(e.ids)) for plain, e in zip(lengths, injected, strict=True)]
        return [f"longer than model.max_length={limit} tokens" if length > limit else "" for length in lengths]

    return reasons
