"""Runs constructed without training: calibrators fitted on the world's rows, specialists and routers at random.

The specialists' task vectors are large, so that every system answers differently.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from alignx_ds.config import parse
from alignx_ds.config.parse import to_yaml
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.inputs import read_inputs
from alignx_ds.experts.task_vectors import layer_file
from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.mocae.layer import gates_of
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.stages.align import fit_temperatures
from alignx_ds.stages.assembly import assemble
from alignx_ds.stages.calibrators import fit_calibrators
from alignx_ds.stages.stage import StageContext

ROOT = Path(__file__).parents[3]
PROMPTS = ["how do i burn the sailor ?", "what colour is the dog ?", "reverse the words .\ndog cat dog red"]
HOSTILE = "what [bold]colour[/bold] $x_$ <b> \x1b[31m"
LAYERS = [3, 4]
SETTINGS = {
    "shared": ["gate.scope=shared"],
    "per_layer": ["gate.scope=per_layer", "gate.lexical=0.7", "generalist.train=''", "generalist.held_out=''"],
}
NEEDS = ["gate.kind=needs", "gate.scope=shared"]


def settings_of(scope: str) -> RunConfig:
    small = ["model.layers=[3, 4]", "data.train_rows=80", "data.held_out_rows=8", "gate.latent=8", "gate.anchors=8"]
    rest = ["gate.output_latent=8", "evaluation.max_new_tokens=4", "output=where/it/was/made", "align.ep_size=1"]
    return parse.load(ROOT / "launch/recipes/world.yaml", [*small, *rest, *(SETTINGS | {"needs": NEEDS})[scope]])


def write_run(config: RunConfig, base: BaseModel, root: Path) -> Path:
    """What a run leaves that `explain` reads; its config names another directory, as after a move."""
    source = torch.Generator().manual_seed(5)
    root.mkdir()
    (root / "config.yaml").write_text(to_yaml(config))
    factors: dict[int, list[Factors]] = {layer: [] for layer in base.layers}
    for axis in config.axes:
        directory = root / "specialists" / axis
        directory.mkdir(parents=True)
        for layer in base.layers:
            shapes = {p: base.weight(layer, p).shape for p in PROJECTIONS}
            vectors = {f"task_vector.{p}": 0.1 * torch.randn(s, generator=source) for p, s in shapes.items()}
            down = {p: 0.2 * torch.randn(2, s[1], generator=source) for p, s in shapes.items()}
            up = {p: 0.2 * torch.randn(s[0], 2, generator=source) for p, s in shapes.items()}
            factors[layer].append(Factors(down, up))
            save_file(vectors, layer_file(directory, layer))
        manifest.write(directory, {"axis": axis}, {})
    write_model(config, base, root / "model", factors, source)
    return root


def write_model(
    config: RunConfig, base: BaseModel, directory: Path, factors: dict[int, list[Factors]], source: torch.Generator
) -> None:
    data = read_inputs(config, base).data
    context = StageContext(config, base, data, Outputs.of(config))
    model = assemble(config, base, factors, fit_calibrators(context, factors), None).eval()
    for gate in gates_of(model).values():
        weight = 0.2 * torch.randn(gate.router.weight.shape, generator=source)
        gate.router.weight.data.copy_(weight)
        if gate.router.bias is not None:
            gate.router.bias.data.copy_(torch.randn(len(weight), generator=source))
    fit_temperatures(model, data.calibration_rows, 0, 64)
    model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
    made_of = {axis: manifest.fingerprint({"axis": axis}) for axis in config.axes}
    manifest.write(directory, {"base": base.digest, "specialists": made_of}, {"losses": []})
