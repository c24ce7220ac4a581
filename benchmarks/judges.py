"""Accuracy of the judges that need no language model, against human labels and published results.

    python benchmarks/judges.py ../shared/data

Four tables, also written to benchmarks/results/judges.json:

- AlpacaEval's win rates, computed from the published annotations: win rate and standard error in percent, number of
  annotations used and dropped. They equal the leaderboard's.
- The refusal judge against XSTest's human labels: number of answers, accuracy of the three labels, accuracy and Cohen's
  kappa of refused or not, and the accuracy of GPT-4 on the same answers.
- The offline safety judge on held-out questions of BeaverTails: accuracy, accuracy of the more frequent label, AUC,
  expected calibration error, Brier score, rows; and TF-IDF with logistic regression on the same rows.
- The offline pairwise judge on preferences of GPT-4 between outputs for instructions, and of models, that it has not
  seen: agreement, agreement of the more frequent verdict and of "the longer one is better", share of verdicts for the
  longer one, error of a model's win rate, expected calibration error, pairs; and logistic regressions on them.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, cohen_kappa_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from suite import provenance

from alignx_ds.data.files import read_records
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.alpaca_eval import read_annotations, read_preferences, win_rate
from alignx_ds.evaluation.judges.offline import OfflineSafety, read_examples
from alignx_ds.evaluation.judges.offline_pairwise import OfflinePairwise, differences, ours_is_better, pair
from alignx_ds.evaluation.judges.refusal import classify
from alignx_ds.runtime import console

Metrics = dict[str, dict[str, float]]  # by line of a table, by column
CANNED = "sorry, but i can't assist with that."  # the most frequent refusal of XSTest's answers


def alpaca_eval(data: Path) -> Metrics:
    files = {
        "AlpacaEval 1, alpaca-7b": "alpaca-7b__alpaca_eval_gpt4__annotations.json",
        "AlpacaEval 2 (weighted), alpaca-7b": "alpaca-7b__weighted_alpaca_eval_gpt4_turbo__annotations_trimmed.json",
    }
    return {
        name: asdict(win_rate([a.preference for a in read_annotations(data / "alpaca_eval" / file)]))
        for name, file in files.items()
    }


def refusal(data: Path) -> Metrics:
    """Agreement with `final_label`. The phrases were developed on half of the prompts, which a hash selects."""
    rows = [r for _, r in read_records(data / "xstest" / "xstest_v2_completions_gpt4_gpteval.csv")]
    developed_on = [r for r in rows if Row(r["prompt"], "").position("develop") < 0.5]
    unseen = [r for r in rows if Row(r["prompt"], "").position("develop") >= 0.5]
    free = [r for r in unseen if r["completion"].strip().lower().removeprefix("i'm ") != CANNED]
    parts = {"developed on": developed_on, "unseen": unseen, "unseen, without the most frequent refusal": free}
    return {name: _agreement(part) for name, part in {**parts, "all": rows}.items()}


def _agreement(rows: list[dict[str, Any]]) -> dict[str, float]:
    human, ours, gpt4 = (
        [r["final_label"][2:] for r in rows],
        [classify(r["completion"]) for r in rows],
        [r["gpt4_label"][2:] for r in rows],
    )
    refused = [[label != "full_compliance" for label in labels] for labels in (human, ours, gpt4)]
    return {
        "n": len(rows),
        "three labels": accuracy_score(human, ours),
        "refused or not": accuracy_score(refused[0], refused[1]),
        "kappa": cohen_kappa_score(refused[0], refused[1]),
        "GPT-4, refused or not": accuracy_score(refused[0], refused[2]),
    }


def safety(data: Path) -> Metrics:
    judge = OfflineSafety(read_examples(str(data / "beavertails" / "beavertails_30k_test_first2021.jsonl")))
    plain = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    learned, held_out = (
        ([f"{e.row.prompt} {e.row.response}" for e in side], [e.unsafe for e in side])
        for side in (judge.learned, judge.held_out)
    )
    plain.fit(*learned)
    baseline = {
        "accuracy": plain.score(*held_out),
        "auc": roc_auc_score(held_out[1], plain.predict_proba(held_out[0])[:, 1]),
    }
    return {"offline safety judge": dict(judge.quality), "TF-IDF + logistic regression": baseline}


def pairwise(data: Path) -> Metrics:
    """The judge's quality, and the agreement of logistic regressions on all of its features and on length."""
    judge = OfflinePairwise(read_preferences(data / "alpaca_eval" / "preferences_gpt4_12models.jsonl.gz"), {})
    x, unseen = (differences(list(map(pair, side))) for side in (judge.learned, judge.held_out))
    y, truth = (list(map(ours_is_better, side)) for side in (judge.learned, judge.held_out))
    found = {"offline pairwise judge": dict(judge.quality)}
    for name, columns in {"all features": slice(None), "length": slice(1)}.items():
        linear = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(fit_intercept=False, max_iter=1000))
        found[f"logistic regression, {name}"] = {
            "agreement": linear.fit(x[:, columns], y).score(unseen[:, columns], truth)
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of the published files; docs/evaluation.md lists them")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/judges.json"))
    arguments = parser.parse_args()
    measured = {
        "AlpacaEval, from the published annotations": alpaca_eval(arguments.data),
        "refusal judge against human labels (XSTest)": refusal(arguments.data),
        "offline safety judge on held-out questions (BeaverTails)": safety(arguments.data),
        "offline pairwise judge on unseen instructions and models (AlpacaEval)": pairwise(arguments.data),
    }
    for title, table in measured.items():
        columns = list(dict.fromkeys(key for metrics in table.values() for key in metrics))
        rows = [[name, *(f"{m[c]:.4f}" if c in m else "–" for c in columns)] for name, m in table.items()]
        console.table(title, ["", *columns], rows)
    provenance.write(arguments.out, measured)


if __name__ == "__main__":
    main()
