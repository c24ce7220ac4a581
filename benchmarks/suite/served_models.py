"""Models with random weights on disk, for a server: the dense base, and AlignX made from it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from alignx_ds.models.base import WORLD_BASES
from suite.systems import AXES, Setting, alignx, dense

BASE, OURS = "dense base", "AlignX"
NAME = "model"  # by which clients ask for it
NEEDS = ({}, *({f"axis {axis}": 1} for axis in range(AXES)))  # of AlignX's requests, in turn


def save(args: argparse.Namespace, folder: Path, lowest: int = 0) -> dict[str, Path]:
    """By system, with the world's tokenizer; AlignX layers from the `lowest` on. No answer ends by itself."""
    torch.manual_seed(0)
    setting, tokenizer = Setting.of(args), AutoTokenizer.from_pretrained(WORLD_BASES["world"])
    base = dense(setting)
    with torch.no_grad():
        base.get_output_embeddings().weight[tokenizer.eos_token_id] = 0
    paths = {BASE: folder / "base", OURS: folder / "alignx"}
    for path, model in zip(paths.values(), (base, alignx(setting, base, lowest=lowest)), strict=True):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def command(path: Path, slots: int, queue: int, context: int, **more: object) -> list[str]:
    """The arguments of the Python interpreter that serve it on a free port, with `more` options of `serve`."""
    options = {"--port": 0, "--name": NAME, "--slots": slots, "--queue": queue, "--context": context}
    options |= {f"--{name.replace('_', '-')}": value for name, value in more.items()}
    return ["-m", "alignx_ds", "serve", str(path), *(str(word) for pair in options.items() for word in pair)]
