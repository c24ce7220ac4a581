"""The base model of a config, and the problems of what is built on it: layers, gates, adapters, and its own shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers.utils import is_flash_attn_2_available

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.texts import SPECIAL, planned
from alignx_ds.errors import ConfigError, Problem, UnreachableError
from alignx_ds.experts.adapters import WANTED, Adapter
from alignx_ds.mocae.gate import CALIBRATORS
from alignx_ds.mocae.settings import ALL
from alignx_ds.models.architecture import caps_attention
from alignx_ds.models.base import BaseModel, Planned
from alignx_ds.models.ends import vocabulary_of
from alignx_ds.models.shapes import shape
from alignx_ds.models.stored import unread_weights
from alignx_ds.models.tokenizer import vocabulary_problem
from alignx_ds.plan import attention, mixtures
from alignx_ds.runtime.attention import FLASH

BYTES = 256


def base_model(c: RunConfig, weights: bool) -> BaseModel:
    """Raises ConfigError where there is none, or where a model to be trained can't have the given shape."""
    if c.from_scratch:
        return BaseModel(c.model, planned(c))
    try:
        return BaseModel(c.model, weights=weights)
    except UnreachableError as error:
        known = shape(c.model.path) if not weights else None
        if known is None:
            fix = "no such directory, and the hub can't be reached; check the path, or the network"
            allowed = "a model directory, a hub id, 'world' or 'scratch'"
            raise ConfigError(Problem("model.path", c.model.path, allowed, fix)) from error
        return BaseModel(c.model, Planned(Path(c.model.path), known))


def settings_problems(c: RunConfig) -> Iterator[Problem]:
    """What can be known without the base model."""
    yield from _attention(c)
    if c.gate.top_k > len(c.expert_names):
        yield Problem("gate.top_k", c.gate.top_k, f"at most the {len(c.expert_names)} experts", "lower it")
    if c.gate.unsure not in ("", ALL, *c.expert_names):
        allowed = f"empty, {ALL}, or one of {', '.join(c.expert_names)}"
        yield Problem("gate.unsure", c.gate.unsure, allowed, "choose one of them")
    floors = sum(axis.floor for axis in c.axes.values())
    if c.gate.kind == "choice" and floors > 1:
        fix = "lower them, or set gate.kind to needs, where they may add up to more"
        yield Problem("axes.*.floor", floors, "floors that add up to at most 1 in a choice", fix)
    for name in sorted(c.gate.more.keys() - CALIBRATORS.keys()):
        known = f"a calibrator of {', '.join(CALIBRATORS) or 'CALIBRATORS, which is empty'}"
        yield Problem(f"gate.more.{name}", c.gate.more[name], known, "see docs/extending.md for how to add one")
    if c.from_scratch:
        yield from _scratch(c)


def _attention(c: RunConfig) -> Iterator[Problem]:
    if c.model.attention != FLASH:
        return
    if not is_flash_attn_2_available():
        fix = "pip install flash-attn on a machine with CUDA; or set it to sdpa, which is as right and needs nothing"
        yield Problem("model.attention", FLASH, "the package flash-attn, and a GPU", fix)
    elif c.model.dtype != "bfloat16":
        yield Problem(
            "model.dtype", c.model.dtype, f"bfloat16 with model.attention={FLASH}", "set model.dtype=bfloat16"
        )


def _scratch(c: RunConfig) -> Iterator[Problem]:
    if c.scratch.vocabulary < BYTES + len(SPECIAL):
        allowed = f"at least {BYTES + len(SPECIAL)}: all bytes and the special tokens"
        yield Problem("scratch.vocabulary", c.scratch.vocabulary, allowed, "raise it")
    if c.scratch.hidden % (2 * max(1, c.scratch.heads)):
        fix = "correct scratch.heads: rotary positions need an even size per head"
        yield Problem("scratch.hidden", c.scratch.hidden, "an even multiple of scratch.heads", fix)


def problems(c: RunConfig, base: BaseModel, weights: bool) -> Iterator[Problem]:
    """Raises ConfigError on an unknown architecture."""
    assert base.table is not None
    yield from _layers(c, base.config.num_hidden_layers)
    yield from _latents(c, base.config.hidden_size)
    if c.model.attention == "sdpa" and caps_attention(base.config):
        allowed = "auto or eager, where a model's attention scores are capped (attn_logit_softcapping)"
        yield Problem("model.attention", "sdpa", allowed, "set it to auto")
    for name, axis in c.axes.items():
        if axis.adapter:
            yield from _adapter(c, base, f"axes.{name}.adapter", axis.adapter)
    yield from mixtures.problems(c, base)
    yield from attention.problems(c, base)
    if c.from_scratch:
        return
    if base.has_tokenizer:
        problem = vocabulary_problem(base.tokenizer, vocabulary_of(base.config), "model.path", c.model.path)
        yield from [problem] if problem else []
    yield from _weights(c, base, weights)


def _weights(c: RunConfig, base: BaseModel, needed: bool) -> Iterator[Problem]:
    """By the headers. A dry run needs no weights, and checks those that are in a directory."""
    if base.has_weights:
        if (needed or base.is_local) and (problem := base.checkpoint_problem()):
            yield problem
        return
    unread = unread_weights(base.path)
    if needed or unread:
        fix = unread or "it has none; save it with safetensors (save_pretrained does)"
        yield Problem("model.path", c.model.path, "a model with safetensors weights", fix)


def _layers(c: RunConfig, count: int) -> Iterator[Problem]:
    chosen = c.model.layers
    if any(layer >= count for layer in chosen) or len(set(chosen)) != len(chosen):
        yield Problem("model.layers", chosen, f"distinct layers from 0 to {count - 1}", "correct the list")
    for name, axis in c.axes.items():
        if any(layer >= count for layer in axis.noise_layers):
            key = f"axes.{name}.noise_layers"
            yield Problem(key, axis.noise_layers, f"layers from 0 to {count - 1}", "correct the list")


def _latents(c: RunConfig, hidden: int) -> Iterator[Problem]:
    latents = {"gate.latent": c.gate.latent}
    if c.gate.output_latent > 0:
        latents["gate.output_latent"] = c.gate.output_latent
    for key, latent in latents.items():
        if latent > hidden:
            yield Problem(key, latent, f"at most the hidden size, {hidden}", "lower it")
        if c.gate.fractal_dimensions > latent:
            yield Problem("gate.fractal_dimensions", c.gate.fractal_dimensions, f"at most {key}, {latent}", "lower it")


def _adapter(c: RunConfig, base: BaseModel, key: str, path: str) -> Iterator[Problem]:
    if c.from_scratch:
        fix = "remove it: an adapter can't have been trained on a base model that this run is going to train"
        yield Problem(key, path, "nothing where model.path is 'scratch'", fix)
        return
    try:
        yield from Adapter(path, key).problems(base)
    except ConfigError as error:
        yield from error.problems
    except UnreachableError:
        yield Problem(key, path, WANTED, "no such directory, and the hub can't be reached; check the path")
