"""An engine's training state in a form that does not depend on the ranks: whole fp32 tensors, canonical names.

The canonical name of an expert's parameter holds the expert's *global* id, whatever rank hosts it; any other
parameter's is its own name. So a state that was saved at one world size, ZeRO stage or ep_size can be restored at any
other. Frozen parameters are not part of it: they are what the job started from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed

WEIGHT = "weight"  # beside the optimizer's own kinds of state, e.g. exp_avg
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Trained:
    """A trained parameter of this rank, its canonical name, and whether this rank saves it for all that hold it."""

    name: str
    parameter: nn.Parameter
    is_mine: bool


def gather(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields ("kind/name", whole fp32 tensor on the CPU) of what this rank saves, one at a time. Collective.

    The kinds are "weight" (the fp32 master) and the optimizer's, e.g. "exp_avg".
    """
    kinds, parameters = _kinds(engine), load_deepspeed().utils
    _link(engine.optimizer)
    for trained in _trained(engine.module):
        for kind in (WEIGHT, *kinds):
            if kind == WEIGHT:
                whole = parameters.safe_get_full_fp32_param(trained.parameter)
            else:
                whole = parameters.safe_get_full_optimizer_state(trained.parameter, kind)
            if trained.is_mine:
                yield f"{kind}/{trained.name}", whole.detach().to("cpu", torch.float32, copy=True)


def facts(engine: Any) -> dict[str, Any]:
    """The rest of the state, for a manifest: the optimizer's scalars, the engine's counters, the schedule's step."""
    state = engine.optimizer.optimizer.state.get(_partitions(engine)[0], {})
    scalars = {k: [float(v), torch.is_tensor(v)] for k, v in state.items() if k not in _kinds(engine)}
    return {
        "kinds": _kinds(engine),
        "scalars": scalars,
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "scheduled": engine.lr_scheduler.last_epoch,
    }


def restore(engine: Any, saved: dict[str, Any], read: Callable[[str], Tensor]) -> None:
    """Put a state into a fresh engine: `saved` are its `facts`, `read` finds a tensor by "kind/name". Collective."""
    zero, kinds = engine.optimizer, list(saved["kinds"])
    for partition in _partitions(engine):
        state = zero.optimizer.state[partition]
        state.update({kind: torch.zeros_like(partition) for kind in kinds})
        state.update({k: torch.tensor(v) if tensor else v for k, (v, tensor) in saved["scalars"].items()})
    _link(zero)
    for trained in _trained(engine.module):
        for kind in (WEIGHT, *kinds):
            _set(trained.parameter, kind, read(f"{kind}/{trained.name}").to(distributed.device()))
    if _is_sharded(zero):
        _refresh_shards(zero)
    for name in COUNTERS:
        setattr(engine, name, saved["counters"][name])
    _fast_forward(engine, saved["scheduled"])


def _trained(module: Any) -> list[Trained]:
    deepspeed = load_deepspeed()
    comm, groups = deepspeed.comm, deepspeed.utils.groups
    experts = _expert_names(module)
    found = []
    for number, (name, p) in enumerate((n, p) for n, p in module.named_parameters() if p.requires_grad):
        if deepspeed.moe.utils.is_moe_param(p):
            if id(p) not in experts:
                continue  # it stands in for experts that are not trained
            group = groups._get_expert_data_parallel_group(p.group_name)
            rank, size = comm.get_rank(group=group), comm.get_world_size(group=group)
        else:
            rank, size = distributed.rank(), distributed.world_size()
        found.append(Trained(experts.get(id(p), name), p, number % size == rank))
    return found


def _expert_names(module: nn.Module) -> dict[int, str]:
    """By id of the parameter, for the experts that this rank hosts."""
    from alignx_ds.mocae.parallel import ParallelMixture

    return {
        id(p): f"{path}.experts.{mixture.first_local + offset}.{name}"
        for path, mixture in module.named_modules()
        if isinstance(mixture, ParallelMixture)
        for offset, expert in enumerate(mixture.local_experts())
        for name, p in expert.named_parameters()
    }


def _is_sharded(zero: Any) -> bool:
    """Whether the parameters themselves are partitioned: ZeRO-3."""
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _partitions(engine: Any) -> list[Tensor]:
    """This rank's flat fp32 partitions, which the inner optimizer works on."""
    zero = engine.optimizer
    found: list[Tensor] = (
        zero.fp32_partitioned_groups_flat if _is_sharded(zero) else zero.single_partition_of_fp32_groups
    )
    return found


def _kinds(engine: Any) -> list[str]:
    """The optimizer's state per weight, e.g. exp_avg and exp_avg_sq; none before its first step."""
    partition = _partitions(engine)[0]
    state = engine.optimizer.optimizer.state.get(partition, {})
    return sorted(k for k, v in state.items() if torch.is_tensor(v) and v.shape == partition.shape)


def _link(zero: Any) -> None:
    """Link every parameter to its part of the flat state. DeepSpeed does so after the first step of the first parameter
    group, which is too early for the other groups."""
    if not _is_sharded(zero):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        _set_shard(parameter, kind, value)
    elif kind == WEIGHT:
        load_deepspeed().utils.safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)  # the weights that the forward pass reads are apart from the fp32 ones
    else:
        load_deepspeed().utils.safe_set_full_optimizer_state(parameter, value, kind)


def _set_shard(parameter: Any, kind: str, value: Tensor) -> None:
    """DeepSpeed's own setter of whole tensors fails where the last rank's part is padded."""
    zero, size = parameter._z3_optimizer, parameter.ds_tensor.numel()
    start = zero._get_param_partition_rank(parameter) * size
    part = value.new_zeros(size)
    own = value.flatten()[start : start + size]
    part[: own.numel()] = own
    zero.set_local_hp_param(part, parameter, None if kind == WEIGHT else kind)


def _refresh_shards(zero: Any) -> None:
    """The low-precision shards, and the small parameters that every rank holds whole, from the fp32 shards."""
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _fast_forward(engine: Any, scheduled: int) -> None:
    """Set the schedule's step, and compute the rates anew: at another ep_size the parameter groups differ."""
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = scheduled
    scheduler._step_count = scheduled + 1
    rates = scheduler.get_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)
