"""The keys of a DeepSpeed JSON: which have an effect here, which have none, and which are refused and why.

DeepSpeed 0.19 ignores unknown keys at the top level. Inside its blocks it has typed models, whose names and types are
taken from DeepSpeed itself where it is installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from alignx_ds.runtime.deepspeed import load_deepspeed
from alignx_ds.training.engine import PASSED_ON

Fault = tuple[str, str, str]  # what the JSON has, what is expected, the fix
SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SWITCHES = frozenset({"wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc"}) | {
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "dataloader_drop_last", "disable_allgather")
}
BLOCKS = {  # of the JSON: module and class of DeepSpeed's model of it
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "tensorboard": ("deepspeed.monitor.config", "TensorBoardConfig"),
    "wandb": ("deepspeed.monitor.config", "WandbConfig"),
    "csv_monitor": ("deepspeed.monitor.config", "CSVConfig"),
    "comet": ("deepspeed.monitor.config", "CometConfig"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
}
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # the modules that they import
PROFILER: dict[str, tuple[type, ...]] = {  # of which DeepSpeed has no model: the types
    **dict.fromkeys(("enabled", "detailed"), (bool,)),
    **dict.fromkeys(("profile_step", "module_depth", "top_modules"), (int,)),
    "recompute_fwd_factor": (int, float),
    "output_file": (str, type(None)),
}
PARTS = {  # blocks without a model: their keys
    "optimizer": frozenset({"type", "params"}),
    "scheduler": frozenset({"type", "params"}),
    "flops_profiler": frozenset(PROFILER),
}
WITHOUT_EFFECT = {  # at the top level, and those IN_ZERO in zero_optimization
    "zero_force_ds_cpu_optimizer": "it concerns optimizers that a program brings along",
    "checkpoint": "the run's own checkpoints are set by checkpoints.*",
    "timers": "the run times its own steps",
    "aio": "nothing is offloaded to NVMe",
    "dataloader_drop_last": "batches are made by the run itself, and all are whole",
    "disable_allgather": "DeepSpeed 0.19 does not read it",
    "vocabulary_size": "DeepSpeed only warns about its value",
    "comms_config": "DeepSpeed does not read it; its key is comms_logger",
    "monitor_config": "DeepSpeed does not read it; its keys are tensorboard, wandb, csv_monitor and comet",
    "stage3_gather_16bit_weights_on_model_save": "the run gathers what it saves by itself",
    "gather_16bit_weights_on_model_save": "the run gathers what it saves by itself",
    "stage3_gather_fp16_weights_on_model_save": "the run gathers what it saves by itself",
    "round_robin_gradients": "it is off: with it DeepSpeed 0.19 gives parts of the state to the wrong parameters",
    "pipeline_loading_checkpoint": "models are not split into a pipeline",
    "save_muon_momentum_buffer_in_memory": "the optimizer is not Muon",
    "elastic_checkpoint": "every checkpoint of the run moves between numbers of ranks",
}
IN_ZERO = frozenset({"round_robin_gradients", "elastic_checkpoint", "gather_16bit_weights_on_model_save"}) | {
    *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
    *("pipeline_loading_checkpoint", "save_muon_momentum_buffer_in_memory"),
}
READ_BELOW_ZERO3 = frozenset({"allgather_partitions", "allgather_bucket_size", "use_multi_rank_bucket_allreduce"}) | {
    *("ignore_unused_parameters", "parameter_alignment")
}
READ_UNDER_ZERO3 = frozenset({"sub_group_size", "prefetch_bucket_size", "param_persistence_threshold"}) | {
    *("model_persistence_threshold", "max_live_parameters", "max_reuse_distance", "log_trace_cache_warnings"),
    *("allgather_sequential", "use_all_reduce_for_fetch_params", "memory_efficient_linear", "override_module_apply"),
}  # and the names with stage3_ before them
IN_DTYPE = "model.dtype says how the model is computed"
REMOVED = "DeepSpeed 0.19 no longer has it"
REFUSED = {  # keys whose block asks for something that the run can't do
    "pipeline": "models are not split into a pipeline",
    "tensor_parallel": "models are not split by tensor parallelism; ZeRO-3 shards them",
    "autotp_size": "models are not split by tensor parallelism; ZeRO-3 shards them",
    "expert_parallel": "align.ep_size spreads the experts",
    "sequence_parallel_size": "sequences are not split over ranks",
    "seq_parallel_communication_data_type": "sequences are not split over ranks",
    "hybrid_engine": "answers are generated by the run's own decoder",
    "autotuning": "only the deepspeed launcher's --autotuning reads it",
    "data_efficiency": "the order of the rows is the run's own",
    "weight_quantization": "the experts are differences of exact weights",
    "compile": "the engine is not compiled; evaluation.compile compiles decoding",
    "activation_checkpointing": "transformers' models do not read it; the recipe's checkpoint_activations does it",
    "torch_autocast": IN_DTYPE,
    "data_types": IN_DTYPE,
    "datastates": "the run writes its own checkpoints",
    "prescale_gradients": "the losses are scaled for means over all ranks",
    "use_data_before_expert_parallelism": "the run makes the groups of experts itself",
    **dict.fromkeys(("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients"), REMOVED),
    **dict.fromkeys(("eigenvalue", "sparse_attention", "elasticity", "graph_harvesting"), REMOVED),
    **dict.fromkeys(("curriculum_learning", "progressive_layer_drop"), REMOVED),
}
ONLY = {  # keys that have one value here
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1.0,
    "managed_gradient_accumulation": True,
}
LOSSY = "results would depend on the number of ranks"
REFUSED_IN: dict[
    str, tuple[Any, str]
] = {  # the same inside the blocks, by dotted name: refused when its value is not the one given here
    "zero_optimization.zero_quantized_weights": (False, LOSSY),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, LOSSY),
    "zero_optimization.zero_quantized_gradients": (False, LOSSY),
    "zero_optimization.zero_hpz_partition_size": (
        1,
        "DeepSpeed 0.19 makes its group once, and a run trains several models",
    ),
    "zero_optimization.zenflow": (None, LOSSY),
    "zero_optimization.stage3_module_granularity_threshold": (0, "DeepSpeed 0.19 fails under it"),
    "zero_optimization.module_granularity_threshold": (0, "DeepSpeed 0.19 fails under it"),
    "zero_optimization.leaf_module": ({}, "DeepSpeed 0.19 fails under it"),
    "zero_optimization.legacy_stage1": (False, REMOVED),
    "zero_optimization.compute_grad_norm": (True, "a step that is not finite is found by its norm"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "checkpoints need whole states"),
    "zero_optimization.offload_optimizer.super_offload": (False, "checkpoints need DeepSpeed's own states"),
    "bf16.check_grad_overflow": (True, "the recipe's nonfinite says what happens to such a step"),
    "bf16.immediate_grad_update": (False, "DeepSpeed reads it only without ZeRO"),
    "bf16.bf16_master_weights_and_grads": (False, "checkpoints hold fp32 weights"),
    "bf16.bf16_optimizer_states": (False, "checkpoints hold fp32 states"),
}
TOP_LEVEL = PASSED_ON | {*WITHOUT_EFFECT, *REFUSED, *ONLY} - IN_ZERO


def deepspeed_models() -> dict[str, Any]:
    """DeepSpeed's model of each block, a pydantic class; none where DeepSpeed is not installed."""
    try:
        load_deepspeed()
    except ImportError:
        return {}
    return {block: getattr(importlib.import_module(module), name) for block, (module, name) in BLOCKS.items()}


def names_of(model: Any) -> set[str]:
    """Every name that a JSON may use in a block with this model, also within its own blocks."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        found |= {name, field.alias or name}
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields"):
                found |= names_of(kind)
    return found


def unknown(place: str, known: Collection[str]) -> Fault:
    """Of a key at a dotted place where these are known."""
    fix = nearest(place.split(".")[-1], known, "remove it")
    return f"unknown key {place}", "a key of DeepSpeed's configuration", fix


def nearest(name: str, known: Collection[str], otherwise: str) -> str:
    """A fix that proposes the known name that is most alike, where one is."""
    alike = {k.lower(): k for k in known}
    found = get_close_matches(name.lower(), alike, n=1)
    return f"did you mean {alike[found[0]]}? otherwise {otherwise}" if found else otherwise


def is_number(value: Any) -> bool:
    """Finite, and no bool, which Python counts among the integers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
