"""The models of a finished run: its base model, its tokenizer, and the aligned model."""

from __future__ import annotations

from dataclasses import replace

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignx_ds.config.schema import SCRATCH_MODEL
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models import pretrained
from alignx_ds.models.backbone import load_aligned
from alignx_ds.models.base import BaseModel
from alignx_ds.models.pretrained import NO_CODE
from alignx_ds.runs.finished import KEY, FinishedRun
from alignx_ds.runtime import distributed


def base_of(run: FinishedRun) -> BaseModel:
    """Raises ConfigError or UnreachableError when the base model is not where the run's config says."""
    settings = run.config.model
    if settings.path == SCRATCH_MODEL:
        settings = replace(settings, path=str(run.out.base))
    return BaseModel(settings)


def tokenizer_of(run: FinishedRun) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the aligned model. Raises ConfigError when it names code of its own."""
    pretrained.check(run.out.model, KEY, str(run.root))
    return AutoTokenizer.from_pretrained(run.out.model, **NO_CODE)


def aligned_of(run: FinishedRun) -> AlignXForCausalLM:
    """The aligned model in the dtype that the run saved it in, on this rank's device, in eval mode.

    Raises ConfigError when its directory names code of its own, DataError when its weights do not fit its modules.
    """
    pretrained.check(run.out.model, KEY, str(run.root))
    model = load_aligned(run.out.model)
    model.to(distributed.device()).eval()
    return model
