"""The next token of every row of a batch, each with its own settings and its own random numbers.

A row's draws come from a generator of its own, so its tokens do not depend on the rows beside it. Shapes: B rows,
V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen; a temperature of 0 takes the most likely one."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None  # None: other tokens every time
    top_logprobs: int | None = None  # likely alternatives to be named per token; None: no log-probabilities at all

    def draws(self, choice: int) -> Random:
        """The random numbers of the answer with this number, one for every token."""
        return Random() if self.seed is None else Random(f"{self.seed}/{choice}")


@dataclass(frozen=True)
class Chosen:
    """A token, and if they are asked for its log-probability and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, rows: Sequence[tuple[Sampling, Random]]) -> list[Chosen]:
    """logits [B, V] -> a token per row. Log-probabilities are the model's, before temperature and top_p."""
    logits = logits.float()
    tokens = logits.argmax(-1)
    drawn = [i for i, (sampling, _) in enumerate(rows) if sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _drawn(logits[drawn], [rows[i] for i in drawn])
    chosen = [Chosen(token) for token in tokens.tolist()]
    if named := [i for i, (sampling, _) in enumerate(rows) if sampling.top_logprobs is not None]:
        every = logits[named].log_softmax(-1)
        own = every.gather(-1, tokens[named].unsqueeze(-1)).squeeze(-1).tolist()
        best = every.topk(min(max(rows[i][0].top_logprobs or 0 for i in named), every.shape[-1]), dim=-1)
        for i, logprob, ids, values in zip(named, own, best.indices.tolist(), best.values.tolist(), strict=True):
            top = tuple(zip(ids, values, strict=True))[: rows[i][0].top_logprobs]
            chosen[i] = Chosen(chosen[i].token, logprob, top)
    return chosen


def _drawn(logits: Tensor, rows: Sequence[tuple[Sampling, Random]]) -> Tensor:
    """One draw per row from softmax(logits / temperature), within the likeliest tokens that reach top_p: [B]."""
    temperatures = torch.tensor([s.temperature for s, _ in rows], dtype=torch.float64, device=logits.device)
    p = (logits.double() / temperatures.unsqueeze(-1)).softmax(-1)
    cut = [i for i, (s, _) in enumerate(rows) if s.top_p < 1]
    if cut:
        most = torch.tensor([rows[i][0].top_p for i in cut], dtype=torch.float64, device=logits.device)
        best, order = p[cut].sort(dim=-1, descending=True, stable=True)
        best = best.masked_fill(best.cumsum(-1) - best >= most.unsqueeze(-1), 0.0)
        p[cut] = torch.zeros_like(best).scatter(-1, order, best)
    up_to = p.cumsum(-1)
    at = torch.tensor([[draws.random()] for _, draws in rows], dtype=torch.float64, device=logits.device)
    return torch.searchsorted(up_to, at * up_to[:, -1:], right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
