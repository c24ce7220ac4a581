"""The last user turn of a dialogue, found by token ids: a gate's query is made of its tokens alone.

They have attended to the turns before, which is how these count as context. Pure tensor operations: the host does not
wait for the device. Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def turn_start(ids: Tensor, mask: Tensor, user_turn: Sequence[int]) -> Tensor:
    """The column in which each row's last user turn begins, -1 where none does: ids, mask [B, T] -> [B] int64.

    `user_turn` are the tokens that begin one (`AlignXConfig.user_turn`); those outside the mask don't count.
    """
    width = ids.shape[1] - len(user_turn) + 1
    if not user_turn or width < 1:
        return ids.new_full((len(ids),), -1)
    prompt = torch.where(mask.to(ids.device).bool(), ids, -1)
    found = prompt[:, :width] == user_turn[0]
    for place, token in enumerate(user_turn[1:], start=1):
        found = found & (prompt[:, place : place + width] == token)
    return torch.where(found, torch.arange(width, device=ids.device), -1).amax(1)


def from_column(mask: Tensor, start: Tensor) -> Tensor:
    """The mask [B, T] without the columns before `start` [B]."""
    return mask * (torch.arange(mask.shape[1], device=mask.device) >= start.to(mask.device).unsqueeze(1))


def query_mask(ids: Tensor, mask: Tensor, user_turn: Sequence[int]) -> Tensor:
    """The prompt's tokens from its last user turn on, all of them where no user turn is found.

    ids, mask [B, T], 1 on the prompt's tokens -> [B, T] in the dtype of the mask.
    """
    return from_column(mask, turn_start(ids, mask, user_turn)) if user_turn else mask
