"""What a gate sees of prompts in a base model: the summaries of an FFN's inputs, kept on disk.

Shapes: N prompts, d hidden size.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignx_ds.data.batches import collate
from alignx_ds.data.encode import Example, encode_prompts, pad_token
from alignx_ds.data.user_turn import user_turn
from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.mocae.routing_state import prompt_summary
from alignx_ds.mocae.turns import query_mask
from alignx_ds.runtime import console

BATCH = 16


class PromptFeatures:
    """The queries' features [N, 4d] of a base model's layer, source by source.

    Those of a source are read from a file in `cache` if it is there; its name is a hash of the prompts' tokens, the
    layer and the size of the model's weights.
    """

    def __init__(self, model: Path, layer: int, cache: Path) -> None:
        self.directory, self.layer, self.cache = model, layer, cache
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.user_turn = user_turn(self.tokenizer)
        self._model: nn.Module | None = None

    def examples(self, prompts: list[str]) -> list[Example]:
        """In the chat template, without a system prompt of their own."""
        return [Example(tuple(ids), len(ids)) for ids in encode_prompts(prompts, self.tokenizer)]

    def of(self, name: str, examples: list[Example]) -> Tensor:
        """[N, 4d] fp32: mean, largest, smallest and last state over the tokens of the user's turn."""
        size = sum(p.stat().st_size for p in self.directory.glob("*.safetensors"))
        key = json.dumps([[e.ids for e in examples], self.layer, size])
        path = self.cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            console.say(f"{len(examples)} prompts of {name} through the base model")
            save_file({"features": self._made(examples).half()}, path)
        return load_file(path)["features"].float()

    @torch.no_grad()
    def _made(self, examples: list[Example]) -> Tensor:
        model, pad_id = self._loaded(), pad_token(self.tokenizer)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))  # little padding
        seen: list[Tensor] = []
        ffn = backbone_of(model.config.model_type).ffn_of(model, self.layer)
        handle = ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        found = []
        for start in range(0, len(order), BATCH):
            part = collate([examples[i] for i in order[start : start + BATCH]], pad_id)
            model.get_decoder()(part.input_ids, part.attention_mask, use_cache=False)
            asked = query_mask(part.input_ids, part.attention_mask, self.user_turn)
            found.append(prompt_summary(seen.pop(), asked))
        handle.remove()
        return torch.cat(found)[torch.tensor(order).argsort()]

    def _loaded(self) -> nn.Module:
        """The model, without the layers above the one that is looked at."""
        if self._model is None:
            model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
            del backbone_of(model.config.model_type).decoder_layers(model)[self.layer + 1 :]
            self._model = model
        return self._model
