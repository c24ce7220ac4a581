"""The models of a finished run: its base model, its tokenizer, and the aligned model."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from alignx_ds.config.schema import SCRATCH_MODEL
from alignx_ds.errors import DataError
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models import pretrained
from alignx_ds.models.backbone import load_aligned
from alignx_ds.models.base import BaseModel
from alignx_ds.models.ends import answering_tokenizer, set_ends
from alignx_ds.runs.finished import KEY, FinishedRun
from alignx_ds.runtime import distributed


def base_of(run: FinishedRun) -> BaseModel:
    """Raises ConfigError or UnreachableError when the base model is not where the run's config says, DataError when it
    is not the one that the aligned model was made from."""
    settings = run.config.model
    if settings.path == SCRATCH_MODEL:
        settings = replace(settings, path=str(run.out.base))
    base, made_from = BaseModel(settings), run.model_inputs.get("base")
    if made_from and base.digest != made_from:
        changed = sorted(name for name in {*made_from, *base.digest} if made_from.get(name) != base.digest.get(name))
        raise DataError(f"{base.path}: {', '.join(changed)} changed since the run was made; restore the base model")
    return base


def tokenizer_of(run: FinishedRun) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the aligned model. Raises ConfigError when it can't be read as data."""
    pretrained.check(run.out.model, KEY, str(run.root))
    return answering_tokenizer(run.out.model, KEY, str(run.root))


def aligned_of(run: FinishedRun) -> AlignXForCausalLM:
    """The aligned model in the dtype that the run saved it in, on this rank's device, in eval mode.

    Its generation config names every token that ends an answer.

    Raises ConfigError when its directory names code of its own, or its weights do not fit its modules.
    """
    pretrained.check(run.out.model, KEY, str(run.root))
    model = load_aligned(run.out.model)
    set_ends(model, tokenizer_of(run))
    model.to(distributed.device()).eval()
    return model
