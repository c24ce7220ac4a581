"""`alignx-ds export dense RUN_DIR OUT`: experts merged into a plain checkpoint of the backbone's own class.

It has no gate and loads without this package. Its card has the measured difference from the aligned model.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from alignx_ds.data.encode import pad_token
from alignx_ds.export import cards
from alignx_ds.export.fidelity import Fidelity, answered, compare, plain, routed
from alignx_ds.export.measured import measured
from alignx_ds.export.merged import backbone_with, changes_of, factors_of
from alignx_ds.export.prompts import prompts_of
from alignx_ds.export.weights import Weights, described, parse_weights
from alignx_ds.models import tokenizer as tokenizers
from alignx_ds.models.finished import aligned_of, tokenizer_of
from alignx_ds.runs import manifest
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.runs.new_directory import new_directory
from alignx_ds.runtime import console


def export(
    root: Path,
    out: Path,
    chosen: str,
    prompts: Path | None,
    count: int,
    limit: int,
    published: cards.Publication,
) -> None:
    """Write the directory, and print how far it is from the aligned model. Raises ConfigError or DataError.

    `chosen` names axes, or `axis=weight` pairs. The models are compared on the answers, of at most `limit` tokens, to
    `count` prompts of each set, or of the file `prompts`.
    """
    run = FinishedRun.open(root)
    merged = parse_weights(chosen, run.axes)
    prompts_by_set = prompts_of(run, prompts, count)
    aligned, tokenizer = aligned_of(run), tokenizer_of(run)
    with new_directory(out) as directory:
        experts = [(weight, factors_of(aligned, aligned.config.experts.index(axis))) for axis, weight in merged.items()]
        model = backbone_with(aligned, changes_of(experts))
        kind = type(model).__name__
        found: dict[str, Fidelity] = {}
        for name, lines in prompts_by_set.items():
            examples = answered(aligned, tokenizer, lines, limit)
            found[name] = compare(plain(model), routed(aligned), examples, pad_token(tokenizer))
            console.say(f"against the aligned model, on prompts of {name}: {found[name]}")
        model.save_pretrained(directory)
        tokenizers.save(tokenizer, directory, run.out.model)
        _for_llama_cpp(directory, tokenizer)
        manifest.write_text(directory / "README.md", _card(run, published, kind, merged, found))
    console.say(f"dense {kind}: {out}" if prompts_by_set else f"dense {kind}: {out}\n  {cards.NOT_MEASURED}")


def _for_llama_cpp(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the added tokens where llama.cpp's converter looks for those that a SentencePiece model lacks.

    transformers writes them into tokenizer.json alone since version 5, and still reads them here.
    """
    if (directory / tokenizers.SENTENCEPIECE).is_file():
        path = directory / "tokenizer_config.json"
        added = {str(number): token.__getstate__() for number, token in tokenizer.added_tokens_decoder.items()}
        config = json.loads(path.read_text(encoding="utf-8")) | {"added_tokens_decoder": added}
        manifest.write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    elif tokenizers.falls_back_to_bytes(tokenizer):
        console.note("no tokenizer.model; before a conversion to GGUF, put the base model's into the export")


def _card(
    run: FinishedRun, published: cards.Publication, kind: str, merged: Weights, found: dict[str, Fidelity]
) -> str:
    calibration = " And the calibration of the experts' output." if run.config.gate.output_latent else ""
    return f"""\
{cards.front_matter(run, published, "transformers", ["merge", *merged], "finetune")}
# {published.name}

Experts of an aligned model (AlignX on DeepSpeed), merged into the base model's feed-forward weights:
base + {described(merged)}. The base model is {cards.base_named(run, published)}. The result is a plain
`{kind}`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{published.name}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{published.name}")
```

## What it leaves out

The gate: every prompt is answered with the same weights.{calibration} The difference
from the aligned model that it was made from:

{cards.comparison(found, "prompts of")}

{cards.MEASURED}

{measured(run)}
"""
