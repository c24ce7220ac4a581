"""A training job's checkpoints on disk: whole or not there, checked before use, as many as asked for.

    step_00000040/
      rank0-000.safetensors …   fp32 weights and optimizer state by canonical name (see `state`)
      rng-0.safetensors …       every rank's random number generators
      manifest.json             hashes of the files, step, losses, what the job is made from, resolved config

A checkpoint is written beside its place, synced, and renamed: a crash leaves the one before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignx_ds.errors import DataError
from alignx_ds.runs import manifest
from alignx_ds.runtime import console, distributed
from alignx_ds.training import randomness, state

SHARD_BYTES = 1 << 30  # a rank's file is closed at this size, and no more than that is held in memory
PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    facts: dict[str, Any]  # its manifest's content

    @property
    def step(self) -> int:
        """How many optimizer steps had been made."""
        return int(self.facts["step"])

    @property
    def evaluations(self) -> dict[int, float | None]:
        """By step, of a job that is evaluated while it trains."""
        return dict(self.facts.get("evaluations", ()))

    @property
    def losses(self) -> list[float | None]:
        """Of those steps; None for a skipped one."""
        return list(self.facts["losses"])


def save(directory: Path, engine: Any, step: int, inputs: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Write the engine's state after `step` optimizer steps into a folder of `directory`, which it returns.

    `inputs` is the job's provenance; `facts` go into the manifest. Raises the same DataError on every rank when any of
    them can't write; then nothing is left behind. Collective.
    """
    path = directory / f"{PREFIX}{step:08d}"
    unfinished = directory / f".{path.name}.partial"
    _together(unfinished, lambda: _clear(unfinished), only_main=True)
    _together(unfinished, partial(_write, unfinished, engine))
    _together(unfinished, partial(randomness.save, unfinished))
    known = {"step": step, **facts, "state": state.facts(engine), "world_size": distributed.world_size()}
    _together(unfinished, lambda: _commit(unfinished, path, inputs, known), only_main=True)
    return path


def newest(directory: Path, inputs: dict[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint of a job with these inputs; None where there is none. Collective.

    Damaged checkpoints, and those made from other inputs, are renamed so that they no longer count, with a warning.
    """
    wanted = manifest.fingerprint(inputs)
    for path in distributed.on_main(lambda: _present(directory)):
        found = distributed.on_main(partial(_read, path))
        if isinstance(found, dict) and found["fingerprint"] != wanted:
            console.warn(f"{path}: made from other inputs than this run's, so it is set aside and not used")
            distributed.on_main(partial(_set_aside, path, "foreign"))
            continue
        damage = found if isinstance(found, str) else _damage(path, found["files"])
        if not damage and isinstance(found, dict):
            return Checkpoint(path, found)
        console.warn(f"{damage}: this checkpoint is damaged; the one before it is used, if there is one")
        distributed.on_main(partial(_set_aside, path, "damaged"))
    return None


def at(directory: Path, step: int) -> Checkpoint:
    """The checkpoint after a step. Raises DataError when it is damaged or not there. Collective."""
    path = directory / f"{PREFIX}{step:08d}"
    found = distributed.on_main(partial(_read, path))
    damage = found if isinstance(found, str) else _damage(path, found["files"])
    if damage or isinstance(found, str):
        raise DataError(f"{damage}: it has the job's best weights; remove {directory}, and the job trains anew")
    return Checkpoint(path, found)


def _set_aside(path: Path, why: str) -> None:
    """Rename it, so that it no longer counts; it stays there to be inspected until the job ends."""
    aside = path.with_name(f".{path.name}.{why}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def load(checkpoint: Checkpoint, engine: Any, seed: int) -> None:
    """Put a checkpoint's state into a fresh engine, whose world size, ZeRO stage and ep_size may differ. Collective.

    At the same world size every rank's random number generators are restored too; at another one they are seeded
    from `seed` and the step.
    """
    index: dict[str, Path] = {}
    for path in sorted(checkpoint.path.glob("rank*.safetensors")):
        with safe_open(path, framework="pt") as file:
            index |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Tensor:
        with safe_open(index[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    state.restore(engine, checkpoint.facts["state"], read)
    same = checkpoint.facts["world_size"] == distributed.world_size()
    if same:
        randomness.load(checkpoint.path)
    else:
        randomness.seed(seed, checkpoint.step)


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the first with the lowest loss. On rank 0 alone.

    The loss of a job that is evaluated is that of the evaluation after the checkpoint's step, if there was one.
    """
    whole = [(path, found) for path in _present(directory) if isinstance(found := _read(path), dict)]
    scores = [(path, found.get("evaluation", found["loss"])) for path, found in reversed(whole)]
    losses = {path: score for path, score in scores if score is not None}
    kept = {path for path, _ in whole[:keep]} | ({min(losses, key=losses.__getitem__)} if losses else set())
    for path in _present(directory):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _present(directory: Path) -> list[Path]:
    """Newest first."""
    return sorted(directory.glob(f"{PREFIX}*"), reverse=True) if directory.is_dir() else []


def _read(path: Path) -> dict[str, Any] | str:
    """The content of its manifest, or what is wrong with it."""
    try:
        return manifest.read(path)
    except DataError as error:
        return str(error).split(";")[0]


def _damage(path: Path, files: dict[str, str]) -> str:
    """What is wrong with the first damaged file; every rank checks its share of the files. Collective."""
    damages = [manifest.damage(path, name, files[name]) for name in distributed.rank_share(sorted(files))]
    return next((d for share in distributed.gather(damages) for d in share if d), "")


def _together(directory: Path, work: Callable[[], None], *, only_main: bool = False) -> None:
    """Do `work` on all ranks, or on rank 0. If any can't write, all raise the same DataError, without leftovers."""
    problem = ""
    if not only_main or distributed.is_main():
        try:
            work()
        except (OSError, SafetensorError) as error:
            problem = f"{getattr(error, 'strerror', None) or error} (rank {distributed.rank()})"
    problems = [p for p in distributed.gather(problem) if p]
    if not problems:
        return
    distributed.on_main(lambda: shutil.rmtree(directory, ignore_errors=True))
    fix = "make room or correct the permissions, then run the same command again: it resumes from the checkpoint before"
    raise DataError(f"{directory.parent}: a checkpoint can't be written: {problems[0]}; {fix}")


def _clear(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _write(directory: Path, engine: Any) -> None:
    """Write this rank's share of the state, in files of bounded size.

    After an error the remaining tensors are still gathered, because the other ranks wait for this one.
    """
    tensors = state.gather(engine)
    try:
        for number, shard in enumerate(_shards(tensors)):
            path = directory / f"rank{distributed.rank()}-{number:03d}.safetensors"
            save_file(shard, path)
            manifest.sync(path)
    finally:
        for _ in tensors:
            pass


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        waiting[name] = tensor
        if sum(t.nbytes for t in waiting.values()) >= SHARD_BYTES:
            yield waiting
            waiting = {}
    if waiting:
        yield waiting


def _commit(unfinished: Path, path: Path, inputs: dict[str, Any], facts: dict[str, Any]) -> None:
    manifest.write(unfinished, inputs, facts)
    if path.exists():  # of the same step, when a run was stopped right after it had been written
        shutil.rmtree(path)
    os.rename(unfinished, path)
    manifest.sync(path.parent)
