"""`alignx-ds export dense RUN_DIR OUT`: experts merged into a plain checkpoint of the backbone's own class.

It routes nothing and loads without this package; what that costs is measured and written into its model card.
"""

from __future__ import annotations

from math import isfinite, nan
from pathlib import Path

from alignx_ds.data.encode import pad_token
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.export import cards
from alignx_ds.export.fidelity import Fidelity, compare, plain, routed, written
from alignx_ds.export.merged import backbone_with, changes_of, factors_of
from alignx_ds.export.prompts import prompts_of
from alignx_ds.export.runs import FinishedRun, new_directory
from alignx_ds.runs import manifest
from alignx_ds.runtime import console

KEY, FORM = "--axis, --weights", "axis=weight pairs, as helpful=0.5,honest=0.5"


def export(root: Path, out: Path, chosen: str, prompts: Path | None, count: int, limit: int) -> None:
    """Write the directory, and say how far it is from the mixture; `chosen` is an axis, or weights of several.

    Raises ConfigError or DataError.
    """
    run = FinishedRun.at(root)
    merged = {chosen: 1.0} if chosen in run.axes else parse_weights(chosen, run.axes)
    asked = prompts_of(run, prompts, count)
    with new_directory(out) as directory:
        experts = [(weight, factors_of(run.model, run.expert(axis))) for axis, weight in merged.items()]
        model = backbone_with(run.model, changes_of(experts))
        found: dict[str, Fidelity] = {}
        for name, lines in asked.items():
            texts = written(run.model, run.tokenizer, lines, limit)
            found[name] = compare(plain(model), routed(run.model), texts, pad_token(run.tokenizer))
            console.say(f"against the mixture, on prompts of {name}: {found[name].told()}")
        model.save_pretrained(directory)
        run.tokenizer.save_pretrained(directory)
        manifest.write_text(directory / "README.md", _card(run, out.name, merged, found))
    console.say(f"dense {type(model).__name__}: {out}" if asked else f"{out}: {cards.NOT_MEASURED}")


def parse_weights(text: str, axes: list[str]) -> dict[str, float]:
    """`helpful=0.5,honest=0.5` by axis. Raises ConfigError with everything that is wrong."""
    found: dict[str, float] = {}
    problems = []
    for part in text.split(","):
        axis, _, given = part.strip().partition("=")
        try:
            weight = float(given)
        except ValueError:
            weight = nan
        if axis not in axes:
            problems.append(Problem(KEY, part, f"an axis of the run ({', '.join(axes)})", "correct the name"))
        elif not isfinite(weight) or axis in found:
            problems.append(Problem(KEY, part, FORM, "give each axis once, with a finite number after the ="))
        found[axis] = weight
    if problems:
        raise ConfigError(*problems)
    return found


def _card(run: FinishedRun, name: str, merged: dict[str, float], found: dict[str, Fidelity]) -> str:
    added = " + ".join(f"{weight:g} · {axis}" for axis, weight in merged.items())
    return f"""\
{cards.front_matter(run, ["merge", *merged], library_name="transformers")}
# {name}

Experts of an aligned model (AlignX on DeepSpeed), merged into the base model's feed-forward weights:
base + {added}. The base model is {cards.base_named(run)}. The result is a plain
`{type(run.model.backbone).__name__}`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## What it leaves out

There is no gate: every prompt meets the same weights. The calibration of the experts' output is left out too.
How far it is from the mixture that it was made from:

{cards.compared(found, "prompts of")}
"""
