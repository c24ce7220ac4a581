"""Value-guided decoding: every token is the one with the best sum of its log-probability and the value of what follows.

After the tokens y_<t of an answer to x, the K likeliest next tokens are each completed to a whole answer by greedy
decoding, a judge rates the K answers, and one token is kept:

    y_t = argmax over y in top-K of  log π(y | x, y_<t) + α r(x, y_<t y ŷ),     ŷ = greedy completion of x y_<t y by ρ

Where ρ is π itself this is the look-ahead of DeAL (Huang et al. 2024, arXiv 2402.06147), which stops it after a few
tokens. Where ρ is a model that is aligned already it is the direct transfer of Transfer Q* (Chakraborty et al. 2024,
arXiv 2405.20495), which estimates Q*(x, y_<t y) by the reward of ρ's answer and weighs it by 1/α. With K = 1, or with
α = 0, the answer is π's greedy one. Of equal sums the likelier token is kept.

Shapes: B rows, T prompt tokens, K candidates, V vocabulary, L tokens of an answer at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.batches import pad
from alignx_ds.data.encode import encode_prompts, pad_token
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.best_of import reward
from alignx_ds.evaluation.decode import next_logits, prompt_positions
from alignx_ds.evaluation.judges.protocol import Judge
from alignx_ds.models.ends import ends_of
from alignx_ds.runtime import distributed

Value = Callable[[Tensor], Tensor]  # whole answers [B, K, L], padded -> what each is worth [B, K]


class _Reader:
    """A model that reads its prompts [B, T] and then token by token, and can drop what it has read last."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, limit: int) -> None:
        self.model, self.length = model.eval(), ids.shape[1]
        self.cache = DynamicCache()  # without a config no layer forgets what has left its window: all can be cut back
        self.mask = torch.cat([mask, mask.new_ones(len(mask), limit)], dim=1)
        self.position = mask.sum(-1, keepdim=True) - ids.shape[1]
        self.logits = next_logits(model, ids, mask, prompt_positions(mask), self.cache)  # [B, V]

    def read(self, token: Tensor) -> Tensor:
        """The next token of each row [B, 1] -> the logits after it [B, V]."""
        position = self.position + self.length
        self.length += 1
        self.logits = next_logits(self.model, token, self.mask[:, : self.length], position, self.cache)
        return self.logits

    def back(self, length: int, rows: Tensor) -> None:
        """Only `length` tokens are read, prompt and padding included, and every row has read what `rows` [B] has.

        These must be rows of the same prompt.
        """
        if self.length > length:  # 0 would mean "nothing is left" to some releases of transformers
            self.cache.crop(length - self.length)
        self.cache.reorder_cache(rows)
        self.length = length


@dataclass(frozen=True)
class Guided:
    """Decodes with π = `model`, while ρ = `completer` completes the candidates; both may be the same model."""

    model: PreTrainedModel
    completer: PreTrainedModel
    k: int
    alpha: float

    @torch.no_grad()
    def decode(
        self, ids: Tensor, mask: Tensor, limit: int, ends: list[int], pad_id: int, value: Value
    ) -> tuple[Tensor, int]:
        """ids, mask [B, T] int64, padded on the left -> answers [B, `limit`] int64, padded, and what they cost.

        That is the forward passes that predicted a token of one row: greedy decoding has one for every token.
        """
        rows = torch.arange(len(ids), device=ids.device)
        end_tokens, columns = torch.tensor(ends, device=ids.device), ids.shape[1]
        answers, done = torch.full((len(ids), limit), pad_id, device=ids.device), torch.zeros_like(rows) > 0
        proposing = _Reader(self.model, ids, mask, limit)
        ahead = _Reader(self.completer, ids.repeat_interleave(self.k, 0), mask.repeat_interleave(self.k, 0), limit)
        passes = 0
        for place in range(limit):
            likely, candidates = proposing.logits.float().log_softmax(-1).topk(self.k)
            said = answers.repeat_interleave(self.k, 0)
            said[:, place] = candidates.flatten()
            ended = done.repeat_interleave(self.k)
            passes += int((~done).sum()) + _complete(ahead, said, place, ended, end_tokens, pad_id)
            best = (likely + self.alpha * value(said.view(-1, self.k, limit)).to(likely)).argmax(-1)
            token = candidates[rows, best]
            answers[:, place] = token.masked_fill(done, pad_id)
            done = done | torch.isin(token, end_tokens)
            if place + 1 == limit or bool(done.all()):
                break
            ahead.back(columns + place + 1, (rows * self.k + best).repeat_interleave(self.k))
            proposing.read(token.unsqueeze(-1))
        return answers, passes

    def answers(
        self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], judge: Judge, *, batch: int, max_new_tokens: int
    ) -> tuple[list[str], int]:
        """An answer to each row, guided by this judge, and what they cost; `batch` answers are completed at once."""
        device, pad_id, ends = distributed.device(), pad_token(tokenizer), ends_of(self.model, tokenizer)
        step, texts, passes = max(1, batch // self.k), list[str](), 0
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            ids, mask = (
                t.to(device) for t in pad(encode_prompts([row.chat for row in part], tokenizer), pad_id, "left", 1)
            )
            value = judged(judge, part, tokenizer)
            made, cost = self.decode(ids, mask, max_new_tokens, ends, pad_id, value)
            texts, passes = texts + _texts(made, tokenizer), passes + cost
        return texts, passes


def judged(judge: Judge, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Value:
    """The judge's score of each answer alone, 0–1."""

    def value(tokens: Tensor) -> Tensor:
        asked = [row for row in rows for _ in range(tokens.shape[1])]
        verdicts = judge.verdicts(asked, _texts(tokens.flatten(0, 1), tokenizer))
        found = [reward(judge, row, verdict) / 100 for row, verdict in zip(asked, verdicts, strict=True)]
        return torch.tensor(found, device=tokens.device).view(tokens.shape[:2])

    return value


def _texts(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _complete(ahead: _Reader, said: Tensor, place: int, ended: Tensor, end_tokens: Tensor, pad_id: int) -> int:
    """Complete `said` [B·K, L] after `place` in it, but for the rows that have `ended`; returns the forward passes."""
    passes = 0
    for column in range(place, said.shape[1] - 1):
        ended = ended | torch.isin(said[:, column], end_tokens)
        if bool(ended.all()):
            break
        passes += int((~ended).sum())
        likeliest = ahead.read(said[:, column : column + 1]).argmax(-1)
        said[:, column + 1] = likeliest.masked_fill(ended, pad_id)
    return passes
