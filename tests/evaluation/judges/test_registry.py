"""The registry makes every judge from the settings that it needs, and names what is missing."""

from __future__ import annotations

import sys

import pytest

from alignx_ds.config.evaluation import JudgesConfig
from alignx_ds.errors import ConfigError
from alignx_ds.evaluation.judges.registry import JUDGES, make
from alignx_ds.runtime.extras import missing_package

SETTINGS = JudgesConfig(
    endpoint="http://localhost/v1", endpoint_model="m", truth="t", info="i", moderation="dam", guard="g", batch=3
)
EXACT = ("task", "safety", "truth", "composite")
EXPECTED = {  # part of each judge's identity
    **{name: {"judge": name} for name in EXACT},
    "alpaca_eval": {"judge": "alpaca_eval", "model": "m"},
    "beaver_dam": {"judge": "beaver-dam", "model": "dam"},
    "llama_guard": {"judge": "llama-guard", "model": "g"},
    "truthfulqa": {"judge": "truth-info", "truth": "t", "info": "i"},
    "honeset": {"judge": "honeset", "model": "m"},
    "refusal": {"judge": "refusal"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_judge_is_made_from_its_settings(name: str) -> None:
    judge = make(name, SETTINGS)
    assert EXPECTED[name].items() <= judge.identity.items()
    assert getattr(judge, "batch", 3) == 3


def test_every_judge_has_a_case() -> None:
    assert set(JUDGES) == {*EXPECTED, "offline_safety", "offline_pairwise"}  # which read files: test_offline*.py


@pytest.mark.parametrize("name", ["alpaca_eval", "honeset"])
def test_a_judge_behind_an_endpoint_names_every_missing_setting(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(name, JudgesConfig())
    assert [problem.key for problem in error.value.problems] == ["judges.endpoint", "judges.endpoint_model"]


@pytest.mark.parametrize(("name", "package"), [("offline_safety", "sklearn"), ("alpaca_eval", "openai")])
def test_a_missing_package_is_noticed_before_the_first_answer(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.delitem(sys.modules, "alignx_ds.evaluation.judges.offline", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as error:
        make(name, SETTINGS)
    assert "alignx-ds[" in str(missing_package(error.value))
