"""The judges by the names that a recipe gives them.

A judge's module is imported when that judge is made: each brings heavy packages that the others do not need. A judge
loads its model later still, with the first answer.
"""

from __future__ import annotations

from collections.abc import Callable

from alignx_ds.config.evaluation import JudgesConfig
from alignx_ds.evaluation.judges.protocol import Judge


def make(name: str, settings: JudgesConfig) -> Judge:
    """The judge of this name, one of JUDGES.

    Raises ConfigError if a setting that it needs is missing, and ModuleNotFoundError for a package, which the command
    line turns into one line with the extra to install.
    """
    return _MAKERS[name](settings)


def _task(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.world import Task

    return Task()


def _safety(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.world import Safety

    return Safety()


def _truth(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.world import Truth

    return Truth()


def _composite(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.world import Composite

    return Composite()


def _alpaca_eval(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.pairwise import make

    return make(settings)


def _beaver_dam(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.moderation import BeaverDam

    return BeaverDam(settings.moderation, settings.batch)


def _llama_guard(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.moderation import LlamaGuard

    return LlamaGuard(settings.guard, settings.batch)


def _offline_safety(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.offline import make

    return make(settings)


def _offline_pairwise(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.offline_pairwise import make

    return make(settings)


def _truthfulqa(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.truthfulqa import TruthInfo

    return TruthInfo(settings.truth, settings.info, settings.batch)


def _honeset(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.endpoint import connect
    from alignx_ds.evaluation.judges.honeset import HoneSet

    return HoneSet(connect(settings))


def _refusal(settings: JudgesConfig) -> Judge:
    from alignx_ds.evaluation.judges.refusal import Refusal

    return Refusal()


_MAKERS: dict[str, Callable[[JudgesConfig], Judge]] = {
    "task": _task,
    "safety": _safety,
    "truth": _truth,
    "composite": _composite,
    "alpaca_eval": _alpaca_eval,
    "beaver_dam": _beaver_dam,
    "llama_guard": _llama_guard,
    "offline_safety": _offline_safety,
    "offline_pairwise": _offline_pairwise,
    "truthfulqa": _truthfulqa,
    "honeset": _honeset,
    "refusal": _refusal,
}
JUDGES = tuple(_MAKERS)
FREE = (
    "task",
    "safety",
    "truth",
    "refusal",
    "offline_safety",
)  # need no model and no server, so they may judge anything
