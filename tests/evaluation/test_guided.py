"""Value-guided decoding: a case by hand, the greedy limits, and the same tokens as without cache and batch."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import aligned, base_model, low_rank_experts, padded, random_rows
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.rows import Row
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.evaluation.guided import Guided, judged
from alignx_ds.evaluation.judges.world import Task

PAD, END, LIMIT = 0, 3, 7
A, B, C = 4, 5, 6


class Chain(nn.Module):
    """A model whose next token depends on the last one alone: its log-probabilities are a table."""

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        super().__init__()
        self.logits = torch.full((8, 8), 1e-9).log()
        for before, chances in table.items():
            for token, chance in chances.items():
                self.logits[before, token] = torch.tensor(chance).log()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids])


def worth_of(known: dict[tuple[int, ...], float]) -> Any:
    """A value function by the answer's tokens without padding, and the answers that it is asked for."""
    asked: list[Any] = []

    def value(tokens: Tensor) -> Tensor:
        texts = [[tuple(t for t in one if t != PAD) for one in row] for row in tokens.tolist()]
        asked.append(texts)
        return torch.tensor([[known.get(one, 0.0) for one in row] for row in texts])

    return value, asked


def chain(table: dict[int, dict[int, float]]) -> PreTrainedModel:
    model: Any = Chain(table)
    return model


STEPS = {1: {A: 0.6, B: 0.4}, A: {END: 0.9, C: 0.1}, B: {END: 0.7, C: 0.3}, C: {END: 0.8, A: 0.2}}


def test_a_case_by_hand() -> None:
    """π prefers A END. Completed greedily, A and B give A END and B END; only what begins with B can be worth more.

    First token: log 0.6 + 0 against log 0.4 + ½ α, so B from α = 2 log 1.5 = 0.81 on. Then END or C: B END is worth ½
    and B C END 1, so log 0.7 + ½ α against log 0.3 + α, and C from α = 2 log (7/3) = 1.69 on.
    """
    value, asked = worth_of({(B, END): 0.5, (B, C, END): 1.0})
    ids = torch.tensor([[1]])
    for alpha, expected in ((0.8, [A, END]), (0.82, [B, END]), (1.68, [B, END]), (1.71, [B, C, END])):
        asked.clear()
        made, passes = Guided(chain(STEPS), chain(STEPS), 2, alpha).decode(
            ids, torch.ones_like(ids), LIMIT, [END], PAD, value
        )
        assert made.tolist() == [expected + [PAD] * (LIMIT - len(expected))]
        assert asked[0] == [[(A, END), (B, END)]]
        # Two candidates of one more token each; after A or B only C goes on, and after C only A, by END.
        assert passes == {2: 1 + 2 + 1 + 1, 3: 1 + 2 + 1 + 1 + 1 + 1}[len(expected)]


def test_another_model_s_completions_show_what_the_own_hide() -> None:
    """The completer goes from B to C, so B C END is found; π alone completes B by END, which is worth nothing."""
    value, _ = worth_of({(B, C, END): 1.0})
    ids = torch.tensor([[1]])
    transfer = chain({**STEPS, B: {C: 0.9, END: 0.1}})
    for completer, expected in ((chain(STEPS), [A, END]), (transfer, [B, C, END])):
        made, _ = Guided(chain(STEPS), completer, 2, 5.0).decode(ids, torch.ones_like(ids), LIMIT, [END], PAD, value)
        assert made[0, : len(expected)].tolist() == expected


def worth(tokens: Sequence[int]) -> float:
    """Arbitrary, of an answer's tokens without padding."""
    return sum((number + 1) * token % 7 for number, token in enumerate(t for t in tokens if t != PAD)) / 10


def value(tokens: Tensor) -> Tensor:
    return torch.tensor([[worth(one) for one in row] for row in tokens.tolist()])


@pytest.mark.parametrize(("k", "alpha"), [(1, 3.0), (4, 0.0)])
def test_one_candidate_or_no_weight_is_greedy(k: int, alpha: float) -> None:
    model, (ids, mask) = base_model(), padded(random_rows([5, 9, 4, 7], seed=2), "left")
    expected = Decoder(model).greedy(ids, mask, LIMIT, [END], PAD)
    made, passes = Guided(model, base_model(seed=1), k, alpha).decode(ids, mask, LIMIT, [END], PAD, value)
    assert torch.equal(made, expected)
    assert passes >= int((made != PAD).sum())


def directly(model: PreTrainedModel, completer: PreTrainedModel, ids: list[int], k: int, alpha: float) -> list[int]:
    """One prompt without padding, batch or cache: every completion is read from the start."""
    width = len(ids)

    def logits(who: PreTrainedModel, text: list[int]) -> Tensor:
        kwargs = {}
        if who.config.model_type == "alignx":
            kwargs["prompt_mask"] = torch.tensor([[1] * width + [0] * (len(text) - width)])
        with torch.no_grad():
            return who(torch.tensor([text]), **kwargs).logits[0, -1].double()

    text = list(ids)
    while len(text) < width + LIMIT and text[-1] != END:
        scores = {}
        for token in logits(model, text).topk(k).indices.tolist():
            whole = [*text, token]
            while len(whole) < width + LIMIT and whole[-1] != END:
                whole.append(int(logits(completer, whole).argmax()))
            scores[token] = float(logits(model, text).log_softmax(-1)[token]) + alpha * worth(whole[width:])
        text.append(max(scores, key=scores.__getitem__))
    return text[width:] + [PAD] * (LIMIT - len(text) + width)


@pytest.mark.parametrize("family", ["llama", "mistral", "alignx"])
def test_cache_and_batch_change_no_token(family: str) -> None:
    """Also where a layer's window is shorter than the text, and where routing goes with the cache."""
    base = base_model()
    model = aligned(base, low_rank_experts(base)) if family == "alignx" else base_model(family=family)
    rows = random_rows([5, 9, 4, 7], seed=2)
    ids, mask = padded(rows, "left")
    for completer in (model, base_model(seed=1)):
        made, _ = Guided(model, completer, 3, 2.0).decode(ids, mask, LIMIT, [END], PAD, value)
        assert made.tolist() == [directly(model, completer, list(row), 3, 2.0) for row in rows]
        assert not torch.equal(made, Decoder(model).greedy(ids, mask, LIMIT, [END], PAD))


def test_the_judge_s_score_of_one_answer_is_the_value(world_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Row("a", "the cat"), Row("b", "the dog")]
    cat, dog = (world_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the cat", "the dog"))
    tokens = torch.tensor([[cat, dog], [cat, dog]])
    assert judged(Task(), rows, world_tokenizer)(tokens).tolist() == [[1, 0], [0, 1]]
