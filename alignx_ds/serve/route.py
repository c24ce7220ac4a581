"""`alignx-ds route MODEL FILE`: how an aligned model's gate routes the prompts of a file, one JSON line for each.

The line of a dialogue has the decision at its last user turn, and a list of those at every one.

With labels it is an audit of the routing on a user's own traffic.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignx_ds.data.batches import pad
from alignx_ds.data.encode import encode_prompts, pad_token
from alignx_ds.data.labels import LabelSet, multi_hot, named_set
from alignx_ds.data.rows import Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.routing.metrics import confusion, router_metrics
from alignx_ds.runtime import console
from alignx_ds.serve.model import load

DIGITS = 4  # of the numbers in the output


def route(directory: str, path: str, schema: str, labels: str, batch: int) -> None:
    """Print a JSON line per prompt, as the file has them; with `labels`, the column of what they need, metrics too.

    Raises ConfigError, or DataError for a file, a model or a label that can't be used.
    """
    if batch < 1:
        raise ConfigError(Problem("--batch", batch, "at least 1", "raise it"))
    source = Source(path, schema, {})
    rows = SCHEMAS[schema].held_out(source.records(held_out=True, count=1000, seed=0)).rows
    if not rows:
        raise DataError(f"{path}: no usable row")
    named = source.column(labels) if labels else {}
    model, tokenizer = load(directory)
    names: list[str] = model.config.experts
    known = [_labels(row, named[row.place], names) for row in rows] if labels else []
    logits = []
    dialogues = [user_turns(row) for row in rows]
    decisions = routed(model, tokenizer, [turn for turns in dialogues for turn in turns], batch)
    for turns in dialogues:
        made = list(islice(decisions, len(turns)))
        line, own = made[-1]
        if len(turns) > 1:
            line["turns"] = [_of_turn(turn.prompt, decided) for turn, (decided, _) in zip(turns, made, strict=True)]
        print(json.dumps(line, ensure_ascii=False))
        logits.append(own)
    if labels:
        _audit(torch.stack(logits), multi_hot(known, len(names)), names, model.config.gate_settings().kind)


def user_turns(row: Row) -> list[Row]:
    """The dialogue up to each of its user turns, at which the gate is asked anew; the row itself is the last."""
    earlier = [n for n, turn in enumerate(row.before) if turn.role == "user"]
    return [*(replace(row, prompt=row.before[n].text, before=row.before[:n]) for n in earlier), row]


def _of_turn(asked: str, line: dict[str, Any]) -> dict[str, Any]:
    return {name: asked if name == "prompt" else value for name, value in line.items() if name != "row"}


def routed(
    model: AlignXForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row], batch: int
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """By row: what is printed of it, and the logits [E] fp32 of the lowest gate, which decides in the shared scope."""
    names: list[str] = model.config.experts
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ids, mask = pad(encode_prompts([row.chat for row in part], tokenizer), pad_token(tokenizer), "right")
        with torch.no_grad():
            model(ids.to(model.device), mask.to(model.device), use_cache=False)
            layer, gate = next(iter(gates_of(model).items()))
            decision, distances = model.routing.decisions[layer], gate.distance(model.routing.queries[layer])
        sure = decision.confidence()
        columns = (decision.probabilities(), decision.gates, decision.needs(), decision.logits, sure, distances)
        for row, p, gates, needs, own, confidence, distance in zip(part, *(c.cpu() for c in columns), strict=True):
            line = {
                "row": row.place,
                "prompt": row.asked,
                "expert": names[int(p.argmax())],
                "confidence": round(float(confidence), DIGITS),
                "distance": round(float(distance), DIGITS),
                "probabilities": _named(names, p),
                "gates": _named(names, gates),
            }
            if gate.settings.kind == "needs":
                line["needs"] = _named(names[1:], needs)
            yield line, own


def _named(names: list[str], values: Tensor) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in zip(names, values.tolist(), strict=True)}


def _labels(row: Row, given: Any, names: list[str]) -> LabelSet:
    """The experts of a name, of names with commas between them, or of a list of names; an empty list: none."""
    listed = [part.strip() for part in given.split(",")] if isinstance(given, str) else given
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise DataError(f"{row.place}: the label is {given!r}; give an expert's name, or a list of names")
    return named_set(listed, names, row.place)


def _audit(logits: Tensor, labels: Tensor, names: list[str], kind: str) -> None:
    metrics = router_metrics(logits, labels, kind)
    console.note(", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    for name, row in zip(names, confusion(logits, labels, kind), strict=True):
        counts = ", ".join(f"{chosen} {count}" for chosen, count in zip(names, row, strict=True) if count)
        console.note(f"prompts of {name} go to: {counts or 'there are none'}")
