"""How far the judges that need no model can be believed, on people's own labels and on published figures.

    python benchmarks/judges.py ../shared/data

Prints AlpacaEval's published win rates from their annotations, the refusal detector's agreement with XSTest's human
labels, and the offline safety judge's figures on held-out questions beside plain TF-IDF and logistic regression; writes
them as JSON to benchmarks/results/judges.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, cohen_kappa_score, roc_auc_score
from sklearn.pipeline import make_pipeline

from alignx_ds.data.files import read_records
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.alpaca_eval import read_annotations, win_rate
from alignx_ds.evaluation.judges.offline import OfflineSafety, read_examples
from alignx_ds.evaluation.judges.refusal import classify
from alignx_ds.runtime import console

Figures = dict[str, dict[str, float]]
CANNED = "sorry, but i can't assist with that."


def alpaca_eval(data: Path) -> Figures:
    files = {
        "AlpacaEval 1, alpaca-7b": "alpaca-7b__alpaca_eval_gpt4__annotations.json",
        "AlpacaEval 2 (weighted), alpaca-7b": "alpaca-7b__weighted_alpaca_eval_gpt4_turbo__annotations_trimmed.json",
    }
    return {
        name: asdict(win_rate([a.preference for a in read_annotations(data / "alpaca_eval" / file)]))
        for name, file in files.items()
    }


def refusal(data: Path) -> Figures:
    """Agreement with `final_label`; the phrases were written with the first half of the prompts in view."""
    rows = [r for _, r in read_records(data / "xstest" / "xstest_v2_completions_gpt4_gpteval.csv")]
    seen = [r for r in rows if Row(r["prompt"], "").position("develop") < 0.5]
    unseen = [r for r in rows if Row(r["prompt"], "").position("develop") >= 0.5]
    free = [r for r in unseen if r["completion"].strip().lower().removeprefix("i'm ") != CANNED]
    parts = {"developed on": seen, "not looked at": unseen, "not looked at, without the canned sentence": free}
    return {name: _agreement(part) for name, part in {**parts, "all": rows}.items()}


def _agreement(rows: list[dict[str, Any]]) -> dict[str, float]:
    people, ours, gpt4 = (
        [r["final_label"][2:] for r in rows],
        [classify(r["completion"]) for r in rows],
        [r["gpt4_label"][2:] for r in rows],
    )
    refused = [[label != "full_compliance" for label in labels] for labels in (people, ours, gpt4)]
    return {
        "n": len(rows),
        "three labels": accuracy_score(people, ours),
        "refused or not": accuracy_score(refused[0], refused[1]),
        "kappa": cohen_kappa_score(refused[0], refused[1]),
        "GPT-4, refused or not": accuracy_score(refused[0], refused[2]),
    }


def safety(data: Path) -> Figures:
    judge = OfflineSafety(read_examples(str(data / "beavertails" / "beavertails_30k_test_first2021.jsonl")))
    plain = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    learned, held_out = (
        ([f"{e.row.prompt} {e.row.response}" for e in side], [e.unsafe for e in side])
        for side in (judge.learned, judge.held_out)
    )
    plain.fit(*learned)
    yardstick = {
        "accuracy": plain.score(*held_out),
        "auc": roc_auc_score(held_out[1], plain.predict_proba(held_out[0])[:, 1]),
    }
    return {"offline safety judge": dict(judge.quality), "TF-IDF + logistic regression": yardstick}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of the published files; docs/evaluation.md lists them")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/judges.json"))
    arguments = parser.parse_args()
    measured = {
        "AlpacaEval, from the published annotations": alpaca_eval(arguments.data),
        "refusal detector against people (XSTest)": refusal(arguments.data),
        "offline safety judge on held-out questions (BeaverTails)": safety(arguments.data),
    }
    for title, table in measured.items():
        columns = list(dict.fromkeys(key for figures in table.values() for key in figures))
        rows = [[name, *(f"{f[c]:.4f}" if c in f else "–" for c in columns)] for name, f in table.items()]
        console.table(title, ["", *columns], rows)
    circumstances = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "python": platform.python_version(),
        "scikit-learn": version("scikit-learn"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**circumstances, **measured}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
