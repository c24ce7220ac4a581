"""`alignx-ds export hf RUN_DIR OUT`: the aligned model as a checkpoint to share, with its model card."""

from __future__ import annotations

from pathlib import Path

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.export import cards, remote_code
from alignx_ds.export.measured import measured, results
from alignx_ds.models import tokenizer as tokenizers
from alignx_ds.models.finished import aligned_of, tokenizer_of
from alignx_ds.models.registration import CODE
from alignx_ds.models.templates import template_of
from alignx_ds.runs import manifest
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.runs.new_directory import new_directory
from alignx_ds.runtime import console

LOAD = """\
```python
import alignx_ds  # pip install alignx-ds; registers the architecture with the Auto classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
{encode}
answer = model.generate(**prompt.to(model.device), max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
CHAT = """\
chat = [{"role": "user", "content": "How do I make tea?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
PLAIN = """\
intro = "Below is an instruction that describes a task. Write a response that completes the request."
question = f"{intro}\\n\\n### Instruction:\\nHow do I make tea?\\n\\n### Response:\\n"
prompt = tokenizer(question, return_tensors="pt")"""


def export(root: Path, out: Path, max_shard_size: str, published: cards.Publication) -> None:
    """Write the directory. Raises ConfigError or DataError."""
    run = FinishedRun.open(root)
    model, tokenizer = aligned_of(run), tokenizer_of(run)
    with new_directory(out) as directory:
        try:
            remote_code.save(model, directory, max_shard_size)
        except ValueError as error:
            allowed = "a size such as 5GB or 500MB"
            raise ConfigError(Problem("--max-shard-size", max_shard_size, allowed, str(error))) from error
        tokenizers.save(tokenizer, directory, run.out.model)
        encode = CHAT if template_of(tokenizer) else PLAIN
        manifest.write_text(directory / "README.md", _card(run, published, model.config.layers, encode))
    console.say(f"aligned model with its model card: {out}")


def _card(run: FinishedRun, published: cards.Publication, layers: list[int], encode: str) -> str:
    tags = ["mixture-of-experts", *run.axes]
    return f"""\
{cards.front_matter(run, published, "transformers", tags, "finetune", results(run))}
# {published.name}

A mixture of calibrated experts ({", ".join(run.axes)}, and a generalist), made with AlignX on DeepSpeed. The experts
are in layers {", ".join(map(str, layers))} of the base model: {cards.base_named(run, published)}.
A calibrated gate chooses experts once per user turn, from the last one; the decision is kept with the KV cache.

## Load it

{LOAD.format(name=published.name, encode=encode)}
Without the package, leave its import out and pass `trust_remote_code=True` to `from_pretrained` or `pipeline`, which
runs `{CODE}.py` of this directory: the same model, without the package's kernels for GPUs.

In bfloat16 or float16 the gates stay in float32. Prompts in one batch do not influence each other. The decision needs
the whole prompt, so `generate(prefill_chunk_size=…)` is refused.

## Measured

{measured(run)}
"""
