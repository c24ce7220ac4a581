"""DeepSpeed JSONs as transformers' Trainer and LLaMA-Factory ship them, for tests."""

from __future__ import annotations

from typing import Any

FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16}
CPU = {"device": "cpu", "pin_memory": True}
SIZES = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
COMMON: dict[str, Any] = {
    **SIZES,
    "zero_allow_untested_optimizer": True,
    "fp16": {**FP16, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
}
ZERO2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 5e8,
    "contiguous_gradients": True,
    "round_robin_gradients": True,
}
AUTO_BUCKETS = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    **AUTO_BUCKETS,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
PRESETS = ("zero2_gpu", "zero3_gpu", "zero2_offload", "zero3_offload")  # of ds_configs/
AUTO_ADAMW = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
JSONS: dict[str, dict[str, Any]] = {
    "ds_z0": {**COMMON, "zero_optimization": {**ZERO2, "stage": 0}},
    "ds_z2": {**COMMON, "zero_optimization": ZERO2},
    "ds_z2_offload": {**COMMON, "zero_optimization": {**ZERO2, "offload_optimizer": CPU}},
    "ds_z3": {**COMMON, "zero_optimization": ZERO3},
    "ds_z3_offload": {**COMMON, "zero_optimization": {**ZERO3, "offload_optimizer": CPU, "offload_param": CPU}},
    "trainer_z2": {
        **SIZES,
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": AUTO_ADAMW,
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        "zero_optimization": {**ZERO2, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "none"}},
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "trainer_z3": {
        **SIZES,
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": AUTO_ADAMW,
        "scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, **AUTO_BUCKETS},
    },
    "no_optimizer": {
        **SIZES,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 10000},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000000,
        "wall_clock_breakdown": False,
    },
    "stage_alone": {"zero_optimization": {"stage": 1}},
    "empty": {},
}
