"""`alignx-ds answer` and `alignx-ds judge`: two separate steps, which may run on different machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from alignx_ds.data.rows import Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.evaluation import alpaca_eval, transcripts
from alignx_ds.evaluation.best_of_answers import BestOf, drawn
from alignx_ds.evaluation.endpoint import Endpoint, Names, address_problems
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judge_settings import judges_config
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.moderation import agreement
from alignx_ds.evaluation.judges.pairwise import AlpacaEval
from alignx_ds.evaluation.judges.protocol import Verdict, label
from alignx_ds.evaluation.remote import ANSWER_SECONDS, ask
from alignx_ds.models import content
from alignx_ds.models.backbone import load_answering
from alignx_ds.models.base import local_model
from alignx_ds.runs.manifest import fingerprint
from alignx_ds.runtime import console, distributed

OPTIONS = Names("--endpoint", "MODEL", "--batch")
SAFETY_JUDGES = ("beaver_dam", "llama_guard", "offline_safety")  # their verdicts are compared with each other's


def answer(
    model: str,
    source: str,
    schema: str,
    out: Path,
    limit: int,
    batch: int,
    max_new_tokens: int,
    endpoint: str = "",
    best_of: BestOf | None = None,
) -> Path:
    """Write the model's answers to the rows of `source` into `out`, which is returned: greedy ones, or the best of n.

    With `endpoint`, an OpenAI-compatible server answers, which knows the model by this name. A file that an earlier
    call began is completed. `limit` is the number of rows, 0 for all of them. Raises ConfigError and DataError.
    """
    _check_answer(out, limit, batch, max_new_tokens)
    if best_of:
        transcripts.check_replaceable(drawn(out))
        if endpoint:
            fix = "a server's answers are greedy; leave one of the two out"
            raise ConfigError(Problem("--best-of", best_of.drawing.n, "nothing with --endpoint", fix))
    if wrong := list(address_problems(endpoint, OPTIONS.address)) if endpoint else []:
        raise ConfigError(*wrong)
    records = Source(source, schema, {}).records(held_out=True, count=limit or 1000, seed=0)
    rows = SCHEMAS[schema].held_out(records).rows[: limit or None]
    if not rows:
        raise DataError(f"{source}: no usable row")
    settings = {"seed": 0, "max_new_tokens": max_new_tokens}
    if endpoint:
        server = Endpoint(endpoint, model, batch, ANSWER_SECONDS, max_tokens=max_new_tokens, names=OPTIONS)
        ask(server, transcripts.AnswerFile(out, rows, {**settings, "model": f"{model} at {endpoint}"}))
        return out
    directory = local_model(model, "model")
    logging.disable_progress_bar()
    loaded, tokenizer = load_answering(directory, "model", model)
    loaded.to(distributed.device())
    file = transcripts.AnswerFile(out, rows, {**settings, "model": fingerprint(content.hashes(directory))})
    if best_of:
        best_of.write(loaded, tokenizer, file, batch=batch, max_new_tokens=max_new_tokens)
    else:
        answers(loaded, tokenizer, [row.chat for row in rows], batch=batch, max_new_tokens=max_new_tokens, file=file)
    return out


def _check_answer(out: Path, limit: int, batch: int, max_new_tokens: int) -> None:
    bounds = {"--rows": (limit, 0), "--batch": (batch, 1), "--max-new-tokens": (max_new_tokens, 1)}
    problems = [
        Problem(k, value, f"at least {least}", "raise it") for k, (value, least) in bounds.items() if value < least
    ]
    existing = next((p for p in (out, *out.parents) if p.exists()), out)
    if out.suffix != ".jsonl" or out.is_dir() or (existing != out and not existing.is_dir()):
        problems.append(Problem("--out", str(out), "a .jsonl file in a directory", "choose another"))
    if problems:
        raise ConfigError(*problems)
    transcripts.check_replaceable(out)


def judge(path: Path, name: str, settings: list[str]) -> None:
    """Judge a file of answers and print the metrics; `settings` are keys of the recipe's `judges`, as key=value.

    Verdicts are stored beside the answers. After a second safety judge, its agreement with the first is printed.
    Raises ConfigError and DataError.
    """
    rows, outputs = transcripts.read(path)
    used = registry.make(name, judges_config(settings))
    verdicts = transcripts.verdicts(path.with_suffix(f".{name}.jsonl"), used, rows, outputs)
    metrics = used.metrics(rows, verdicts)
    if isinstance(used, AlpacaEval):
        for written in _write_alpaca_eval(path, used, rows, outputs, verdicts):
            console.say(f"for the alpaca_eval package: {written}")
    table = [[label(key), f"{value:.4f}"] for key, value in metrics.items()]
    console.table(f"{path.name}, judged by {name} ({len(rows)} answers)", ["metric", "value"], table)
    for other in SAFETY_JUDGES if name in SAFETY_JUDGES else ():
        second = transcripts.stored_verdicts(path.with_suffix(f".{other}.jsonl"), rows, outputs)
        if other != name and second is not None:
            numbers = ", ".join(f"{key} {value:.3g}" for key, value in agreement(verdicts, second).items())
            console.say(f"{name} and {other} on the same answers: {numbers}")


def _write_alpaca_eval(
    path: Path, judge: AlpacaEval, rows: list[Row], outputs: list[str], verdicts: list[Verdict]
) -> Iterator[Path]:
    """Write answers, references and verdicts as files that the published package reads; yields each file."""
    baselines = [alpaca_eval.reference_of(row, judge.references) for row in rows]
    answered = alpaca_eval.model_outputs(rows, outputs, judge.references, path.stem)
    preferences = [v["preference"] for v in verdicts]
    files: dict[str, list[alpaca_eval.Output] | list[alpaca_eval.Annotation]] = {
        "model_outputs": answered,
        "reference_outputs": baselines,
        "annotations": alpaca_eval.annotate(baselines, answered, preferences, f"alignx-ds {judge.endpoint.model}"),
    }
    for name, records in files.items():
        target = path.with_suffix(f".{name}.json")
        alpaca_eval.write(target, records)
        yield target
