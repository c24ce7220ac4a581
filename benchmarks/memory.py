"""Memory of AlignX, its base model and the prior ways of fusing experts: counted, and measured as a peak.

    python benchmarks/memory.py --shape llama2-7b --measure-layers 2 6
    python benchmarks/memory.py --shape llama2-7b --device cuda --measure-layers 32
    python benchmarks/memory.py --shape llama2-7b --activations --layers 3 --length 256 \\
        --systems dense alignx h3fusion trinityx

Counted on the meta device, at any shape: weights and buffers by system, KV cache, and a rank's share of the experts at
every ep_size. The peak is measured in a process of its own per system (random weights, a prefill and a few decoded
tokens): on a GPU what torch allocated, on a CPU the process's resident size above that of the imports. Two measured
depths give the cost of a layer; where the whole stack was not measured, its peak is extrapolated, and marked so.

--activations counts instead what a training forward pass keeps for the backward pass, in bytes per token and layer: all
that torch saves but the logits' part, with and without `checkpoint_activations`. Every layer is trained as its stage
does: the dense base's FFNs (stage 1), AlignX's gate, calibrations and factors on the fused path, a fusion's experts.

Columns, in GiB: all weights and buffers, those of the experts' factors, those of gate and output calibration, the ratio
of all to the first system's, and the peak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from typing import Any

import torch
from suite import plots, record
from suite.record import Target
from suite.systems import BUILD, Setting
from torch import nn

from alignx_ds.config.schema import FusionConfig
from alignx_ds.mocae.layer import AlignXLayer, freeze_trunk
from alignx_ds.runtime import console
from alignx_ds.stages import fuse
from alignx_ds.stages.activations import recompute

NAMES = {
    "dense": "dense base",
    "alignx": "AlignX",
    "h3fusion": "H3Fusion",
    "trinityx": "TrinityX",
    "stock": "DeepSpeed MoE",
    "ensemble": "ensemble of 3",
}
GIB = 2**30
DECODED = 4  # tokens after the prefill


def counted(setting: Setting, kind: str) -> dict[str, float]:
    """GiB of the parameters and buffers, by what they are for."""
    meta = Setting(setting.config, "meta", setting.dtype, setting.rank)
    models = BUILD[kind](meta)
    total = sum(_bytes(model) for model in models)
    layers = [m for model in models for m in model.modules() if isinstance(m, AlignXLayer)]
    factors = sum(_bytes(layer.mixture) for layer in layers)
    calibration = sum(_bytes(m) for layer in layers for m in (layer.gate, layer.calibration) if m is not None)
    calibration += sum(_bytes(model.lexicon) for model in models if hasattr(model, "lexicon"))
    named = {"weights": total, "of them experts' factors": factors, "of them gate and calibration": calibration}
    return {name: size / GIB for name, size in named.items()}


def _bytes(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def kv_cache(setting: Setting, batch: int, length: int) -> float:
    c = setting.config
    heads, width = c.num_key_value_heads, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    element = torch.empty((), dtype=setting.dtype).element_size()
    return 2 * c.num_hidden_layers * batch * length * heads * width * element / GIB


def peak(kind: str, args: argparse.Namespace, layers: int) -> float:
    """GiB, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_serve, args=(kind, args, layers, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{NAMES[kind]}: the measured process ended with {process.exitcode}; too little memory?")
    found: float = queue.get()
    return found


def _serve(kind: str, args: argparse.Namespace, layers: int, queue: Any) -> None:
    from alignx_ds.evaluation.decode import Decoder

    setting = Setting.of(args, layers)
    before = _resident()
    models = BUILD[kind](setting)
    ids = torch.randint(3, setting.config.vocab_size, (args.batch, args.length), device=args.device)
    if args.device == "cuda":  # what building the model has left is not part of serving it
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for model in models:
        Decoder(model).greedy(ids, torch.ones_like(ids), DECODED, [-1], 0)
    used = torch.cuda.max_memory_allocated() if args.device == "cuda" else _resident() - before
    queue.put(used / GIB)


def _resident() -> int:
    """The largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kept(setting: Setting, kind: str, batch: int, length: int) -> dict[str, float]:
    """kB per token and layer that a forward pass keeps, without the model's own tensors, plain and recomputing."""
    (model,) = BUILD[kind](setting)
    if kind == "alignx":
        freeze_trunk(model)
    elif kind == "dense":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name)
    else:
        fuse.freeze_trunk(model, FusionConfig())
    ids = torch.randint(3, setting.config.vocab_size, (batch, length), device=setting.device)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}
    for name in ("kept", "recomputed"):
        if name == "recomputed":
            recompute(model)
        saved: dict[int, torch.Tensor] = {}  # a storage is counted once, and kept, so that no other takes its address

        def pack(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(input_ids=ids, use_cache=False, logits_to_keep=1)
        size = sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in own)
        found[name] = size / (1000 * ids.numel() * setting.config.num_hidden_layers)
    return found


def whole_peak(by_depth: dict[int, float], layers: int) -> tuple[float, bool]:
    """(GiB at the shape's own depth, whether it was measured there)."""
    if layers in by_depth:
        return by_depth[layers], True
    (low, at_low), (high, at_high) = min(by_depth.items()), max(by_depth.items())
    each = (at_high - at_low) / (high - low)
    return at_low + each * (layers - low), False


def main() -> None:
    parser = record.parser(__doc__, shape="llama2-7b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--measure-layers", type=int, nargs="*", default=[], help="depths at which to measure the peak")
    parser.add_argument("--activations", action="store_true", help="count what a training forward pass keeps")
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES))
    args = parser.parse_args()
    args.dtype = args.dtype or "bfloat16"
    setting = Setting.of(args)
    if args.activations:
        by_system = {kind: kept(setting, kind, args.batch, args.length) for kind in args.systems}
        rows = [[NAMES[kind], *(f"{size:.1f}" for size in f.values())] for kind, f in by_system.items()]
        console.table(f"kB per token and layer, {setting.dtype}", ["system", "kept", "recomputed"], rows)
        console.say(f"written: {record.write('activations', args, {'kb_per_token_and_layer': by_system}, [])}")
        return
    depth = setting.config.num_hidden_layers
    cache = kv_cache(setting, args.batch, args.length + DECODED)
    found: dict[str, dict[str, Any]] = {kind: counted(setting, kind) for kind in args.systems}
    for kind in args.systems if args.measure_layers else ():
        by_depth = {layers: peak(kind, args, layers) for layers in args.measure_layers}
        if depth in by_depth or len(by_depth) > 1:
            found[kind]["peak"], measured = whole_peak(by_depth, depth)
            found[kind] |= {"peak is": "measured" if measured else "extrapolated", "measured by depth": by_depth}
    show(found, setting, cache)
    met = targets(found)
    record.print_targets(met)
    content = {
        "kv_cache_gib": cache,
        "systems_gib": found,
        "experts_gib_per_rank": placed(found, setting),
    }
    path = record.write("memory", args, json.loads(json.dumps(content)), met)
    plot(found, path.with_suffix(".png"))
    console.say(f"written: {path}")


def placed(found: dict[str, dict[str, Any]], setting: Setting) -> dict[str, float]:
    """A rank's share of the experts' factors in stage 2, where the generalist's zeros are hosted too."""
    if "alignx" not in found:
        return {}
    hosted = found["alignx"]["of them experts' factors"] * 4 / 3
    return {f"ep_size {size}": hosted / size for size in (1, 2, 4)}


def targets(found: dict[str, dict[str, Any]]) -> list[Target]:
    if not {"dense", "alignx", "h3fusion"} <= found.keys():
        return []
    dense, ours, theirs = (found[kind] for kind in ("dense", "alignx", "h3fusion"))
    made = [
        Target("weights: AlignX over dense", ours["weights"] / dense["weights"], 1.06),
        Target("weights: less than H3Fusion", 1 - ours["weights"] / theirs["weights"], 0.50, at_least=True),
    ]
    if "peak" in ours and "peak" in theirs:
        how = "" if ours["peak is"] == "measured" else " (extrapolated)"
        made.append(Target(f"peak: less than H3Fusion{how}", 1 - ours["peak"] / theirs["peak"], 0.45, at_least=True))
    return made


def show(found: dict[str, dict[str, Any]], setting: Setting, cache: float) -> None:
    rows = []
    for kind, f in found.items():
        figures = [f"{f[name]:.3f}" for name in ("weights", "of them experts' factors", "of them gate and calibration")]
        ratio = f"{f['weights'] / next(iter(found.values()))['weights']:.3f}"
        measured = f"{f['peak']:.3f}{'' if f['peak is'] == 'measured' else ' *'}" if "peak" in f else "-"
        rows.append([NAMES[kind], *figures, ratio, measured])
    columns = ["GiB", "weights", "factors", "gate, calibration", f"x {NAMES[next(iter(found))]}", "peak"]
    console.table(
        f"{setting.dtype}, rank {setting.rank}; KV cache of the measured prompt {cache:.3f} GiB", columns, rows
    )
    if any(f.get("peak is") == "extrapolated" for f in found.values()):
        console.say("* extrapolated from shallower stacks of the same width")


def plot(found: dict[str, dict[str, Any]], path: Any) -> None:
    figure, axis = plots.subplots(figsize=(6, 0.5 * len(found) + 1.2))
    kinds = list(found)[::-1]
    colours = [plots.OURS if k == "alignx" else plots.THEIRS for k in kinds]
    bars = axis.barh([NAMES[k] for k in kinds], [found[k]["weights"] for k in kinds], color=colours)
    axis.bar_label(bars, fmt="%.1f", label_type="center", color="white", fontsize=9)
    for place, kind in enumerate(kinds):
        if "peak" in found[kind]:
            axis.plot([found[kind]["peak"]] * 2, [place - 0.4, place + 0.4], color="#c0392b")
    axis.set_xlabel("GiB of weights (red: peak while serving)")
    axis.margins(x=0.12)
    plots.save(figure, path)


if __name__ == "__main__":
    main()
