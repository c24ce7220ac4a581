"""H3Fusion, made of a dense model with three full copies of each FFN, behind the server of `alignx-ds serve`.

Started by benchmarks/serving.py: python -m suite.serve_fusion MODEL COPIES SLOTS CONTEXT
"""

from __future__ import annotations

import socket
import sys

import torch

from alignx_ds.baselines.fusion import FullExperts, replace_ffns
from alignx_ds.mocae.backbones import backbone_of
from alignx_ds.mocae.experts import FeedForward
from alignx_ds.serve.model import load_any
from alignx_ds.serve.server import Settings, answer, api_of
from suite.systems import H3FUSION


def main() -> None:
    path, (copies, slots, context) = sys.argv[1], map(int, sys.argv[2:])
    model, tokenizer = load_any(path)

    def block(layer: int, ffn: FeedForward) -> FullExperts:
        return FullExperts([ffn] * copies, H3FUSION)

    with torch.device(model.device):
        table, layers = backbone_of(model.config.model_type), list(range(model.config.num_hidden_layers))
        replace_ffns(model, table, layers, block)
    model.eval().requires_grad_(False)
    settings = Settings(path, port=0, name="model", slots=slots, queue=slots, context=context)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        answer(api_of(model, tokenizer, settings, None), listening)


if __name__ == "__main__":
    main()
