"""Requests' prompts as token ids."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from alignx_ds.data.encode import encode_prompts
from alignx_ds.data.rows import Chat
from alignx_ds.errors import DataError


class PromptEncoder:
    """Encodes with one tokenizer, for a model with so many tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def chat(self, turns: Chat) -> list[int]:
        """A dialogue in the chat template, as `alignx-ds generate` writes it. Raises DataError."""
        (ids,) = encode_prompts([turns], self._tokenizer)
        return ids

    def text(self, prompt: str | list[int]) -> list[int]:
        """A text as it is, its special tokens included, behind those that the tokenizer puts before every text; or ids.

        Raises DataError for ids that are no tokens of the model.
        """
        if isinstance(prompt, list):
            if wrong := [token for token in prompt if not 0 <= token < self._vocabulary]:
                raise DataError(f"the prompt has the token {wrong[0]}; the model's are 0 to {self._vocabulary - 1}")
            return prompt
        plain: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole: list[int] = self._tokenizer(prompt)["input_ids"]
        before = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        written = plain[:before] == whole[:before]  # by the client itself
        return plain if written else whole[:before] + plain  # some tokenizers end every text too, which is left out
