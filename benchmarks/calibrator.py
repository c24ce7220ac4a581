"""Share of a decoder layer's time that the calibrated gate and the output calibration take at prefill.

    python benchmarks/calibrator.py --shape small --device cpu
    python benchmarks/calibrator.py --shape llama2-7b --layers 2 --device cuda

With gate.scope=shared the gate runs once per prompt, in the lowest AlignX layer; the output is calibrated in every
layer. The parts and the whole layer run in turn, on the same input.

Columns: median milliseconds over the rounds, their quartiles, the median of the rounds' ratios to the whole layer, and
the number of floating-point operations (10⁹, counted by formula, without attention scores).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from suite import plots, record
from suite.record import Target
from suite.systems import ANCHORS, AXES, SCALES, Setting, alignx
from suite.timing import Times, interleaved
from torch import Tensor, nn

from alignx_ds.mocae.gate import Query
from alignx_ds.mocae.layer import AlignXLayer, alignx_layers
from alignx_ds.mocae.routing_state import SUMMARIES, prompt_summary
from alignx_ds.runtime import console

LAYER, BASE_LAYER, GATE, OUTPUT = "decoder layer with AlignX", "decoder layer without", "gate", "output calibration"


@torch.no_grad()
def measure(setting: Setting, batch: int, length: int, repeats: int) -> dict[str, Times]:
    model: Any = alignx(setting)
    seen: dict[str, Any] = {}
    decoder = model.backbone.model.layers[0]
    layer: AlignXLayer = alignx_layers(model)[0]
    calibration = layer.calibration
    assert calibration is not None, "output_latent is above 0"

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = (args, kwargs)

        return hook

    hooks = [
        module.register_forward_pre_hook(remember(name), with_kwargs=True)
        for name, module in (("decoder", decoder), ("ffn", layer), ("calibration", calibration))
    ]
    ids = torch.randint(3, setting.config.vocab_size, (batch, length), device=setting.device)
    mask = torch.ones_like(ids)
    model(ids, mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    x: Tensor = seen["ffn"][0][0]
    routing = model.forward_pass.routing

    def gate() -> None:
        assert layer.gate is not None
        layer.gate(Query(prompt_summary(x, mask), model.lexicon(ids, mask)))

    def whole() -> None:
        for kept in (routing.gathered, routing.steps, routing.rows, routing.groups, routing.tables):
            kept.clear()  # computed again, as for a new prompt
        decoder(*seen["decoder"][0], **seen["decoder"][1])

    def without() -> None:
        decoder.mlp = layer.ffn
        decoder(*seen["decoder"][0], **seen["decoder"][1])
        decoder.mlp = layer

    def output() -> None:
        calibration(*seen["calibration"][0], **seen["calibration"][1])

    work = {BASE_LAYER: without, LAYER: whole, GATE: gate, OUTPUT: output}
    return interleaved(work, repeats, setting.device)


def flops(setting: Setting, batch: int, length: int) -> dict[str, float]:
    """Multiplications and additions in units of 10⁹, without attention scores."""
    c, tokens, k, q = setting.config, batch * length, setting.latent, setting.output_latent
    d, f = c.hidden_size, c.intermediate_size
    gate = 2 * batch * (SUMMARIES * d * k + (AXES + 1) * k * k)
    output = 2 * tokens * (2 * d * q + 2 * 4 * ANCHORS + ANCHORS * SCALES)
    base = 2 * tokens * (4 * d * d + 3 * d * f)
    factors = 2 * tokens * 3 * setting.rank * (d + f)
    return {
        n: v / 1e9 for n, v in {BASE_LAYER: base, LAYER: base + factors + output, GATE: gate, OUTPUT: output}.items()
    }


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    args: argparse.Namespace = parser.parse_args()
    torch.manual_seed(0)
    setting = Setting.of(args)
    times, counts = measure(setting, args.batch, args.length, args.repeats), flops(setting, args.batch, args.length)
    layers = setting.config.num_hidden_layers
    gate, output = times[GATE].over(times[LAYER]), times[OUTPUT].over(times[LAYER])
    rows = [
        [
            n,
            f"{t.median:.2f}",
            "{:.2f} – {:.2f}".format(*t.quartiles),
            f"{t.over(times[LAYER]):.4f}",
            f"{counts[n]:.3f}",
        ]
        for n, t in times.items()
    ]
    title = f"prefill, batch {args.batch}, length {args.length}, {setting.dtype}"
    console.table(title, ["part", "ms", "quartiles", "of the layer", "GFLOP"], rows)
    met = [
        Target("gate and calibration, of the layer that decides", gate + output, 0.02),
        Target("gate and calibration, mean over the layers", gate / layers + output, 0.02),
    ]
    record.print_targets(met)
    content = {
        "prompt": [args.batch, args.length],
        "milliseconds": {n: t.rounds for n, t in times.items()},
        "gflop": counts,
    }
    path = record.write("calibrator", args, content, met)
    plot(times, path.with_suffix(".png"))
    console.say(f"written: {path}")


def plot(times: dict[str, Times], path: Any) -> None:
    figure, axis = plots.subplots(figsize=(6, 1.8))
    names = [OUTPUT, GATE, BASE_LAYER]
    shares = [100 * times[n].over(times[LAYER]) for n in names[:2]]
    shares.append(100 * (1 - times[BASE_LAYER].over(times[LAYER])))
    bars = axis.barh([OUTPUT, GATE, "all of AlignX"], shares, color=[plots.OURS, plots.OURS, plots.THEIRS])
    axis.bar_label(bars, fmt="%.2f %%", padding=2, fontsize=8)
    axis.axvline(2, color="#c0392b", linewidth=0.8)
    axis.set_xlabel("% of the decoder layer's time at prefill (red: target for gate and calibration)", fontsize=8)
    axis.margins(x=0.12)
    plots.save(figure, path)


if __name__ == "__main__":
    main()
