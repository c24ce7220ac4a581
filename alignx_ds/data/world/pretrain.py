"""Train a base model of the world from scratch: `python -m alignx_ds.data.world.pretrain world`, or `world-needs`.

The package ships the results in `alignx_ds/models/assets`, so a run does not train them. Training takes about
25 minutes on 2 cores. `world-needs` has also read messages that ask for several things, and dialogues.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignx_ds.data.world.corpus import Corpus, Exchange
from alignx_ds.data.world.lexicon import World
from alignx_ds.data.world.tokenizer import build_tokenizer
from alignx_ds.data.world.wide_corpus import WideCorpus
from alignx_ds.models.base import WORLD_BASES

CORPORA: dict[str, Callable[[World, int], Iterable[Exchange]]] = {"world": Corpus, "world-needs": WideCorpus}
STEPS = {"world": 7000, "world-needs": 6000}


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_of(exchange: Exchange) -> str:
    """The exchange as the chat template writes it, or plain text if the user's message is empty."""
    head = f"<system> {exchange.system} " if exchange.system else ""
    said = [
        f"<user> {user} <assistant> {answer} <eos>" if user else f"{answer} <eos>" for user, answer in exchange.turns
    ]
    return f"<bos> {head}{' '.join(said)}"


def batches(
    corpus: Iterable[Exchange], tokenizer: PreTrainedTokenizerFast, rows: int, seed: int
) -> Iterator[BatchEncoding]:
    """Endless batches of exchanges, each of about the same length so that there is little padding."""
    stream, rng = iter(corpus), random.Random(seed)
    while True:
        texts = sorted((text_of(e) for e in itertools.islice(stream, 16 * rows)), key=lambda text: len(text.split()))
        chunks = [texts[i : i + rows] for i in range(0, len(texts), rows)]
        for chunk in rng.sample(chunks, len(chunks)):
            yield tokenizer(chunk, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)


def train(name: str, steps: int, rows: int, peak_lr: float, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    corpus = CORPORA[name]
    tokenizer = build_tokenizer(World(), corpus(World(), 0))
    model = LlamaForCausalLM(base_config(tokenizer))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps, pct_start=0.05)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    start = time.monotonic()
    for step, batch in enumerate(
        itertools.islice(batches(corpus(World(), seed + 1), tokenizer, rows, seed + 1), steps), start=1
    ):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps} loss {loss.item():.4f} {time.monotonic() - start:.0f}s", flush=True)
        if step % 1000 == 0 or step == steps:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CORPORA)
    parser.add_argument("--steps", type=int, help="(default: 7000; for world-needs, whose exchanges are longer, 6000)")
    parser.add_argument("--rows", type=int, default=128, help="exchanges per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="(default: where the package ships it)")
    arguments = parser.parse_args()
    train(
        arguments.name,
        arguments.steps or STEPS[arguments.name],
        arguments.rows,
        arguments.lr,
        arguments.seed,
        arguments.out or WORLD_BASES[arguments.name],
    )
