"""One answer from the specialists' answers: the one that most of them give, or one that a fuser writes.

*Instruct* and *Summary* are named after the fusions of texts of H3Fusion (arXiv 2411.17792), of which its authors'
repository has no code. The wordings are ours, and the fuser is a model of the run that is not trained for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from alignx_ds.data.rows import Chat, Row, Turn

WORDINGS = {
    "instruct": "Here are the answers of several assistants to one request:\n\n{answers}\n\n"
    "With the help of what is right in them, answer the request:\n\n{request}",
    "summary": "Here are the answers of several assistants to one request:\n\n{request}\n\n{answers}\n\n"
    "Summarise them in one answer.",
}


def fusion_prompt(wording: str, row: Row, answers: Sequence[str]) -> Chat:
    """The row's dialogue, with its request and the numbered answers to it as the last user turn."""
    numbered = "\n".join(f"{number}. {answer}" for number, answer in enumerate(answers, 1))
    return (*row.before, Turn("user", wording.format(request=row.prompt, answers=numbered)))


def normalised(answer: str) -> str:
    """Answers that differ in case, spacing or what ends their last sentence count as the same one."""
    return " ".join(answer.casefold().split()).rstrip(" .!?")


def by_support(answers: Sequence[str]) -> list[list[int]]:
    """The numbers of the answers that are the same, the largest groups first; equally large ones in their order."""
    groups: dict[str, list[int]] = {}
    for number, answer in enumerate(answers):
        groups.setdefault(normalised(answer), []).append(number)
    return sorted(groups.values(), key=len, reverse=True)


def is_tied(answers: Sequence[str]) -> bool:
    """Whether no answer has more givers than every other one, as is the rule with long free texts."""
    sizes = [len(group) for group in by_support(answers)]
    return sizes.count(sizes[0]) > 1


def majority(answers: Sequence[str], log_likelihoods: Sequence[float]) -> int:
    """The number of the answer that most give: the first of its group.

    Of tied groups, the one with the largest mean of its answers' log-likelihoods per token, each by the model that gave
    it. So where no two agree, the surest specialist answers.
    """
    groups = by_support(answers)
    most = [group for group in groups if len(group) == len(groups[0])]
    return max(most, key=lambda group: mean(log_likelihoods[number] for number in group))[0]
