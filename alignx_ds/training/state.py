"""An engine's training state in a form that does not depend on the ranks: whole fp32 tensors, canonical names.

The canonical name of an expert's factor holds the expert's *global* id, whatever rank hosts it, and on the fused path
it is a part of a parameter, a stack of all experts' factors. Any other parameter's name is its own. So a state that was
saved at one world size, ZeRO stage or ep_size can be restored at any other. Frozen parameters are not part of it: they
are what the job started from. Nor are the generalist's factors, which are zero: training leaves them at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import load_deepspeed

WEIGHT = "weight"  # beside the optimizer's own kinds of state, e.g. exp_avg
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Trained:
    """A trained parameter of this rank, and whether this rank saves it for all that hold it."""

    parameter: nn.Parameter
    is_mine: bool
    parts: Callable[[Tensor], dict[str, Tensor]]  # views of a tensor of the parameter's shape, by canonical name


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
            for name, part in trained.parts(whole.detach()).items() if trained.is_mine else ():
                made = torch.empty(part.shape, dtype=torch.float32)  # contiguous, which the part may not be
                yield f"{kind}/{name}", made.copy_(part)


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
            whole = torch.zeros(getattr(trained.parameter, "ds_shape", trained.parameter.shape))
            for name, part in trained.parts(whole).items():
                part.copy_(read(f"{kind}/{name}"))
            _set(trained.parameter, kind, whole.to(distributed.device()))
    if _is_sharded(zero):
        _refresh_shards(zero)
    for name in COUNTERS:
        setattr(engine, name, saved["counters"][name])
    _fast_forward(engine, saved["scheduled"])


def _trained(module: nn.Module) -> list[Trained]:
    deepspeed = load_deepspeed()
    comm, groups = deepspeed.comm, deepspeed.utils.groups
    parts_of = _parts_of_experts(module)
    found = []
    for number, (name, p) in enumerate((n, p) for n, p in module.named_parameters() if p.requires_grad):
        parts = parts_of.get(id(p), partial(_one_part, name))
        if deepspeed.moe.utils.is_moe_param(p):
            if id(p) not in parts_of:
                continue  # the generalist's, or it stands in for experts that are not trained
            marked: Any = p
            group = groups._get_expert_data_parallel_group(marked.group_name)
            rank, size = comm.get_rank(group=group), comm.get_world_size(group=group)
        else:
            rank, size = distributed.rank(), distributed.world_size()
        found.append(Trained(p, number % size == rank, parts))
    return found


def _one_part(name: str, whole: Tensor) -> dict[str, Tensor]:
    return {name: whole}


def _parts_of_experts(module: nn.Module) -> dict[int, Callable[[Tensor], dict[str, Tensor]]]:
    """By id of the parameter, for the specialists' factors that this rank hosts, however they are hosted."""
    from alignx_ds.mocae.fused import STACKS, FusedMixture
    from alignx_ds.mocae.parallel import ParallelMixture

    def stacked(prefix: str, mixture: FusedMixture, name: str, whole: Tensor) -> dict[str, Tensor]:
        return {f"{prefix}.{factor}": part for factor, part in mixture.by_expert(name, whole).items()}

    found: dict[int, Callable[[Tensor], dict[str, Tensor]]] = {}
    for path, mixture in module.named_modules():
        prefix = f"{path}.experts"
        if isinstance(mixture, FusedMixture):
            found |= {id(getattr(mixture, name)): partial(stacked, prefix, mixture, name) for name in STACKS}
        elif isinstance(mixture, ParallelMixture):
            for number, expert in enumerate(mixture.local_experts(), start=mixture.first_local):
                factors = expert.named_parameters() if number else ()
                found |= {id(p): partial(_one_part, f"{prefix}.{number}.{name}") for name, p in factors}
    return found


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
