"""One rank of the real command with a fault in it: `FAULT='{"rank": 1, "kind": "kill", …}' faulty.py align RECIPE …`.

The product does not depend on this file: it wraps the functions in which the fault is to happen, then runs the command.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

Action = Callable[[], None]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def before(owner: Any, name: str, do: Action, when: Callable[..., bool] = lambda *a, **k: True) -> None:
    """Do it once, right before the first call of `owner.name` for which `when` holds."""
    original, done = getattr(owner, name), []

    def wrapped(*args: Any, **options: Any) -> Any:
        if not done and when(*args, **options):
            done.append(True)
            do()
        return original(*args, **options)

    setattr(owner, name, wrapped)


def position() -> list[Any]:
    """[job, step], kept up to date: the step that is under way, or what follows it before the next one begins."""
    from alignx_ds.training.manager import CheckpointManager

    place: list[Any] = ["", 0]
    restore, after = CheckpointManager.restore, CheckpointManager.after_step

    def restored(self: CheckpointManager, engine: Any) -> Any:
        losses = restore(self, engine)
        place[:] = [self.name, len(losses) + 1]
        return losses

    def after_step(self: CheckpointManager, engine: Any, losses: list[Any], *, now: bool) -> None:
        after(self, engine, losses, now=now)
        place[:] = [self.name, len(losses) + 1]

    CheckpointManager.restore, CheckpointManager.after_step = restored, after_step  # type: ignore[method-assign]
    return place


def install(fault: dict[str, Any]) -> None:
    from alignx_ds.evaluation.evaluate import Evaluation
    from alignx_ds.runs import manifest
    from alignx_ds.stages import align, calibrators, finetune
    from alignx_ds.training import checkpoints, loop, preferences
    from alignx_ds.training.manager import CheckpointManager

    here = [fault.get("job", ""), fault.get("step", 0)]
    now, syncs = position(), list[Any]()
    do = {"kill": kill, "term": partial(send, signal.SIGTERM), "usr1": partial(send, signal.SIGUSR1)}.get(fault["kind"])
    place = fault.get("place", "step")
    if do is None:
        poison(fault["kind"], here, now, every=fault.get("every", False))
    elif place == "step":  # its update is made, no checkpoint of it is
        before(CheckpointManager, "after_step", do, lambda self, _, losses, **kw: [self.name, len(losses)] == here)
    elif place == "forward":
        before(loop, "_spread_nonfinite", do, lambda loss: now == here)
    elif place == "save":  # in the midst of writing a checkpoint: at its n-th sync to the disk
        before(manifest, "sync", do, lambda path: now == here and (syncs.append(path) or len(syncs) == fault["sync"]))
    elif place == "rename":
        before(os, "rename", do, lambda *_: now == here)
    elif place == "prune":
        before(checkpoints, "prune", do, lambda *_: now == here)
    elif place == "reference":
        before(preferences.ObjectiveLoss, "_of_all", do)  # of the first job that has one
    elif place == "extract":
        before(finetune, "_extract", do, lambda context, tune, *_: f"stage1/{tune.name}" == here[0])
    elif place == "fit":
        before(calibrators, "fit_calibrators", do)
    elif place == "calibrate":
        before(align, "fit_temperatures", do)
    elif place == "seal":
        before(manifest, "write", do, lambda directory, *_: directory.name == here[0])
    elif place == "answer":
        before(Evaluation, "evaluate", do, lambda self, system, *_: system.name == here[0])
    else:
        raise SystemExit(f"no such place: {place}")


def poison(kind: str, here: list[Any], now: list[Any], *, every: bool) -> None:
    """This rank's loss becomes NaN, or a gradient infinite under a loss that is whole: at a step, or from it on."""
    from alignx_ds.training import loop

    spread = loop._spread_nonfinite

    def poisoned(loss: Any) -> Any:
        if now[0] == here[0] and (now[1] == here[1] or (every and now[1] > here[1])):
            if kind == "nan loss":
                loss.data.fill_(math.nan)
            else:
                loss = loss + 0.0  # a tensor of its own to hook, whatever else the loss is used for
                loss.register_hook(lambda gradient: gradient * math.inf)
        return spread(loss)

    loop._spread_nonfinite = poisoned


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    fault = json.loads(os.environ.get("FAULT", "null"))
    if fault and os.environ["RANK"] == str(fault["rank"]):
        install(fault)
    from alignx_ds.cli import run

    run()
