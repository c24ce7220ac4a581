"""Fits the geometry of each gate and of each AlignX layer's output, from the assembled model's own features.

The features come from one pass over rows without injected prompts, with the true expert forced, so that a gate above
other AlignX layers is fitted on what it will see in use. PCA, Ledoit–Wolf shrinkage and k-means are scikit-learn's. The
paper (arXiv 2602.07381) names the calibrators; what is fitted for them is ours (docs/method.md).
Shapes: d size of a location's features, k latent size, f dimensions of the fractal score, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alignx_ds.config.schema import GateConfig
from alignx_ds.data.batches import collate
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.data.labels import source_repeats
from alignx_ds.errors import DataError
from alignx_ds.mocae.fractal import fractal_score, local_dimension, log_mass
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.mocae.natural import natural_score
from alignx_ds.runtime import distributed

TOKENS_PER_EXPERT = 4096  # about how many outputs of each expert a layer's output geometry is fitted on
WIDER = 4  # the discriminative directions are searched within this many times the latent size of PCA dimensions
VARIANCE_FLOOR = 1e-3  # the least variance of an expert in any direction, as a share of its mean variance
Seen = list[tuple[int, Tensor]]  # (row number, features)


@dataclass(frozen=True)
class Features:
    """The features of one location by expert id: `by_expert[e]` [N_e, d] fp32, in the order of the rows."""

    by_expert: list[Tensor]


@torch.no_grad()
def collect(
    model: AlignXForCausalLM, rows: LabelledExamples, pad_id: int, batch: int
) -> tuple[dict[int, Features], dict[int, Features]]:
    """(queries of each gate, sampled outputs of each mixture that is calibrated), both by decoder layer. Collective.

    Every rank runs its share of the rows, with the experts that own them forced, and returns the features of all ranks.
    Of an expert with several sources, the features of the smaller ones are repeated, so that they weigh more.
    """
    device, experts = distributed.device(), len(model.config.experts)
    queries: dict[int, Seen] = {i: [] for i in model.config.layers}
    layers = zip(model.config.layers, alignx_layers(model), strict=True)
    calibrated = {i: layer.mixture for i, layer in layers if layer.calibration is not None}
    outputs: dict[int, Seen] = {i: [] for i in calibrated}
    quota = [max(1, TOKENS_PER_EXPERT // max(1, rows.experts.count(e))) for e in range(experts)]
    latest: dict[int, Tensor] = {}
    hooks = [mixture.register_forward_hook(_remember(latest, i)) for i, mixture in calibrated.items()]
    model.eval()
    own = distributed.rank_share(list(range(len(rows.examples))))
    own.sort(key=lambda i: len(rows.examples[i].ids))  # little padding; `_pool` puts the rows back in order
    for chosen, wanted in distributed.lockstep(own, batch, len(rows.examples), 0):
        part = collate([rows.examples[i] for i in chosen], pad_id)
        labels = torch.tensor([rows.experts[i] for i in chosen])
        forced = nn.functional.one_hot(labels, experts).float().to(device)
        ids, mask, asked = (t.to(device) for t in (part.input_ids, part.attention_mask, part.prompt_mask))
        model(ids, mask, asked, forced=forced, use_cache=False, logits_to_keep=1)  # none are used
        if not wanted:
            continue
        sampled = [_sample(part.attention_mask[i], quota[rows.experts[row]], row) for i, row in enumerate(chosen)]
        lines = torch.cat([torch.full_like(places, i) for i, places in enumerate(sampled)]).to(device)
        columns, sizes = torch.cat(sampled).to(device), [len(places) for places in sampled]
        # The host waits for the device once per layer, not once per row.
        for index, query in model.routing.queries.items():
            queries[index] += zip(chosen, _parts(query.features, [1] * len(chosen)), strict=True)
        for index, y in latest.items():
            outputs[index] += zip(chosen, _parts(y[lines, columns], sizes), strict=True)
    for hook in hooks:
        hook.remove()
    gates = {i for i in model.config.layers if model.config.gate_layer(i) == i}
    pooled_queries = {i: _pool(queries[i], rows, experts) for i in gates}
    return pooled_queries, {i: _pool(seen, rows, experts) for i, seen in outputs.items()}


def _remember(latest: dict[int, Tensor], index: int) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        latest[index] = output

    return hook


def _sample(mask: Tensor, quota: int, row: int) -> Tensor:
    """The places [n] of at most `quota` of a row's tokens, evenly spaced, from its attention mask [T].

    The first one's place depends on the row's number.
    """
    places = mask.nonzero().flatten()
    stride = -(-len(places) // quota)
    return places[row % stride :: stride]


def _parts(features: Tensor, sizes: list[int]) -> list[Tensor]:
    """Parts of these sizes, fp32 on the CPU. They are copies: `_pool` would send a view with the whole tensor."""
    return [part.clone() for part in torch.split(features.float().cpu(), sizes)]


def _pool(seen: Seen, rows: LabelledExamples, experts: int) -> Features:
    """All ranks' features by expert, in the order of the rows: k-means depends on it, and ranks must not change it."""
    whole = sorted((item for share in distributed.gather(seen) for item in share), key=lambda item: item[0])
    repeats = source_repeats(rows.experts, rows.sources)
    by_expert = [[t for row, t in whole if rows.experts[row] == e for _ in range(repeats[row])] for e in range(experts)]
    return Features([torch.cat(p) if p else torch.zeros(0, 0) for p in by_expert])


@dataclass(frozen=True)
class LatentSpace:
    """z = P(h − μ), whitened over the features of all experts: centre μ [d] and projection P [k, d], fp64."""

    centre: Tensor
    projection: Tensor

    def of(self, rows: Tensor) -> NDArray[np.float64]:
        """rows [N, d] -> z [N, k]."""
        latents: NDArray[np.float64] = ((rows.double() - self.centre) @ self.projection.T).numpy()
        return latents


def fit(
    features: Features, calibration_rows: Features, latent: int, settings: GateConfig, names: list[str], seed: int
) -> Geometry:
    """The geometry of one location; the calibration split sets only the constants that standardise the two scores.

    `names` are the experts' names for messages. Raises DataError when there are too few rows for the settings.
    """
    _check_rows(features, latent, settings, names)
    return geometry_in(latent_space(features, latent, seed), features, calibration_rows, settings, seed)


def _check_rows(features: Features, latent: int, settings: GateConfig, names: list[str]) -> None:
    for name, rows in zip(names, features.by_expert, strict=True):
        needed = max(2, settings.anchors)
        if 0 < len(rows) < needed:
            raise DataError(
                f"{name}: {len(rows)} rows are too few to fit its geometry; give {needed}, or lower gate.anchors"
            )
    total = sum(len(rows) for rows in features.by_expert)
    if total <= latent:
        raise DataError(f"{total} rows are too few for a latent size of {latent}; give more, or lower gate.latent")


def latent_space(features: Features, latent: int, seed: int, *, discriminative: bool = True) -> LatentSpace:
    """Whitened coordinates: first the discriminative directions, then the leading PCA ones; k = `latent`.

    The discriminative directions span the experts' means within the leading WIDER·k PCA dimensions. Without them
    (`discriminative=False`) the few leading dimensions, which the fractal score uses, hold what varies most, such as
    length, whether or not it separates the experts.
    """
    from sklearn.decomposition import PCA  # here: a start that fits nothing is faster by a second or two

    present = [i for i, rows in enumerate(features.by_expert) if len(rows)]
    pooled = torch.cat([features.by_expert[i] for i in present]).double().numpy()
    size = min(WIDER * latent, pooled.shape[1], len(pooled) - 1)
    pca = PCA(n_components=size, random_state=seed).fit(pooled)
    spread = np.sqrt(np.maximum(pca.explained_variance_, 1e-12 * pca.explained_variance_[0]))
    whiten = pca.components_ / spread[:, None]
    first = np.zeros((size, 0))
    if discriminative and len(present) > 1:
        means = [(features.by_expert[i].double().numpy().mean(0) - pca.mean_) @ whiten.T for i in present]
        shares = [len(features.by_expert[i]) / len(pooled) for i in present]
        weighted = np.sqrt(shares)[:, None] * np.stack(means)
        first = np.linalg.svd(weighted, full_matrices=False)[2][: len(present) - 1].T
    basis, _ = np.linalg.qr(np.concatenate([first, np.eye(size)], axis=1)[:, :latent])
    return LatentSpace(torch.from_numpy(pca.mean_), torch.from_numpy(basis.T @ whiten))


def geometry_in(
    space: LatentSpace, features: Features, calibration_rows: Features, settings: GateConfig, seed: int
) -> Geometry:
    """Every expert's mean, covariance, anchors and dimension in a latent space, and the scores' standardisation."""
    # An expert without rows gets the statistics of all rows, so that all are finite; `present` keeps queries from it.
    pooled = torch.cat([rows for rows in features.by_expert if len(rows)])
    latents = [space.of(rows if len(rows) else pooled) for rows in features.by_expert]
    factors = [np.linalg.cholesky(_covariance(z)) for z in latents]
    scales = settings.granularity * 2.0 ** torch.arange(1, settings.scales + 1)
    f = min(settings.fractal_dimensions, len(space.projection))
    anchors = torch.stack([_anchors(z[:, :f], settings.anchors, seed) for z in latents])
    own = [
        local_dimension(log_mass(torch.from_numpy(z[:, :f]).float(), anchors, scales)[:, e], scales).mean()
        for e, z in enumerate(latents)
    ]
    raw = Geometry(
        centre=space.centre.float(),
        projection=space.projection.float(),
        means=torch.stack([torch.from_numpy(z.mean(0)) for z in latents]).float(),
        whiteners=torch.stack([torch.from_numpy(np.linalg.inv(c)) for c in factors]).float(),
        log_volumes=torch.tensor([float(np.log(np.diag(c)).sum()) for c in factors]),
        anchors=anchors,
        scales=scales,
        present=torch.tensor([float(len(rows) > 0) for rows in features.by_expert]),
        dimensions=torch.stack(own),
        score_shift=torch.zeros(2),
        score_scale=torch.ones(2),
    )
    return _standardised(raw, torch.cat([rows for rows in calibration_rows.by_expert if len(rows)]))


def _covariance(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Ledoit–Wolf covariance [k, k] with a floor under its eigenvalues: many rows are hardly shrunk at all."""
    from sklearn.covariance import LedoitWolf

    variances, directions = np.linalg.eigh(LedoitWolf().fit(z).covariance_)
    floor = VARIANCE_FLOOR * max(float(variances.mean()), float(np.finfo(np.float32).tiny))
    whole: NDArray[np.float64] = (directions * np.maximum(variances, floor)) @ directions.T
    return whole


def _anchors(z: NDArray[np.float64], count: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    centres = KMeans(count, n_init=1, random_state=seed).fit(z).cluster_centers_
    return torch.from_numpy(centres).float()


def _standardised(raw: Geometry, rows: Tensor) -> Geometry:
    z = (rows - raw.centre) @ raw.projection.T
    fractal = fractal_score(z[:, : raw.anchors.shape[-1]], raw.anchors, raw.scales, raw.dimensions)
    natural = natural_score(z, raw.means, raw.whiteners, raw.log_volumes)
    scores = torch.stack([fractal, natural])[..., raw.present > 0].flatten(1)
    shift, scale = scores.mean(1), scores.std(1).clamp_min(1e-6)
    return replace(raw, score_shift=shift, score_scale=scale)
