"""What a trained model shows of itself: pictures, how near its samples come to training images, and how likely images are.

Shapes: B images, Q queries, T training images, D dimensions of an image.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vaejob.data.batches import EVALUATION_BLOCK, DataSet
from vaejob.errors import DataError, VaejobError
from vaejob.likelihood.units import bits_per_dim
from vaejob.loaded import LoadedModel
from vaejob.metrics import LayerTotals
from vaejob.pictures.grid import png_bytes
from vaejob.training.evaluate import Blocks, layer_diagnostics
from vaejob.training.step import draw_levels, evaluation_noise

SAMPLES = 32
PAIRS = 16
PATHS, STEPS = 4, 8
NEIGHBOURS = 12
SEARCHED_IMAGES, SEARCHED_BYTES = 10_000, 1 << 27
"""Training images that are searched for the nearest: at most so many, and so many bytes."""
YARDSTICK_IMAGES = 256
TILE = 128
"""Larger images are reduced to this many pixels a side."""

Told = Callable[[str], None]
Found = TypeVar("Found")


class Distances(NamedTuple):
    """How far the images of one kind are from the nearest training image, in grey levels of 255, root mean square."""

    kind: str
    nearest: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Samples with the nearest of the training images searched."""

    searched: int
    of: int
    pairs: Sequence[tuple[bytes, bytes, float]]
    """Sample, training image, distance; the nearest first."""
    distances: Sequence[Distances]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """-ELBO of one code for each of some images, in bits/dim."""

    kind: str
    data: str
    bits: NDArray[np.float64]
    of: int
    """Images that there are."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Each is what was found, or a line that says why it was not."""

    checkpoint: int
    samples: Sequence[bytes]
    pairs: Sequence[tuple[bytes, bytes]] | str
    pairs_from: str
    paths: Sequence[Sequence[bytes]] | str
    neighbours: Neighbours | str
    scores: Sequence[Scores]
    no_scores: Sequence[str]
    layers: Sequence[tuple[int, LayerTotals]] | str
    layer_images: int


class Source(NamedTuple):
    """A data set to look at, or why it is out of reach."""

    kind: str
    data: DataSet | str


def find(
    model: LoadedModel,
    older: Sequence[Callable[[], LoadedModel]],
    sources: Sequence[Source],
    *,
    images: int,
    tell: Told,
) -> Findings:
    """sources: train, held out if there is any, and another one to be scored besides. older: further checkpoints."""
    train, held_out = sources[0].data, next((source.data for source in sources if source.kind == "held out"), None)
    shown = next(
        (data for data in (held_out, train) if isinstance(data, DataSet)), "no data set of the run is in reach"
    )
    encoder = model.job.model.family != "decoder-only"
    no_encoder = "decoder-only has no encoder: no code follows from an image"
    tell("drawing samples, reconstructions and interpolations")
    samples = model.sample(SAMPLES, mean=True)
    pairs = _tried(lambda: _pairs(model, _reached(shown))) if encoder else no_encoder
    paths = _tried(lambda: _paths(model, _reached(shown))) if encoder else no_encoder
    tell("searching training images for the nearest to samples")
    neighbours = _tried(lambda: _neighbours(model, samples, _reached(train), held_out, encoder=encoder))
    scores: list[Scores] = []
    missing: list[str] = []
    for source in sources:
        tell(f"scoring up to {images:,} images: {source.kind}")
        try:
            scores.append(_scored(model, source, count=images))
        except VaejobError as error:
            missing.append(f"{source.kind}: {error}")
    layers = _tried(lambda: _layers(model, older, _reached(shown), tell)) if encoder else no_encoder
    return Findings(
        checkpoint=model.record.images_seen,
        samples=[tile(image) for image in samples.cpu().numpy()],
        pairs=pairs,
        pairs_from="held-out" if isinstance(held_out, DataSet) else "training",
        paths=paths,
        neighbours=neighbours,
        scores=scores,
        no_scores=missing,
        layers=layers,
        layer_images=min(LAYER_IMAGES, shown.manifest.images) if isinstance(shown, DataSet) else 0,
    )  # fmt: skip


LAYER_IMAGES = 512


def spread_ids(images: int, count: int, *, block: int = EVALUATION_BLOCK) -> NDArray[np.int64]:
    """At most count ids, ascending, in blocks from all over the data set, so that few row groups are read; all if they fit."""
    if images <= count:
        return np.arange(images)
    blocks = math.ceil(count / block)
    block = count // blocks
    starts = np.linspace(0, images - block, num=blocks).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(block))


def nearest(
    queries: UInt8[np.ndarray, "Q D"], images: UInt8[np.ndarray, "T D"]
) -> tuple[NDArray[np.int64], Float[np.ndarray, " Q"]]:
    """For each query the index of the nearest image, and the root mean square of their difference over dimensions."""
    best = np.full(len(queries), np.inf)
    index = np.zeros(len(queries), dtype=np.int64)
    own = queries.astype(np.float64)
    for start in range(0, len(images), 1024):
        block = images[start : start + 1024].astype(np.float64)
        squares = (own**2).sum(1)[:, None] + (block**2).sum(1) - 2 * own @ block.T  # integers below 2^53: exact
        closest = squares.argmin(1)
        found = squares[np.arange(len(queries)), closest]
        nearer = found < best
        index[nearer], best[nearer] = start + closest[nearer], found[nearer]
    return index, np.sqrt(best / queries.shape[1])


def anomaly_auc(usual: NDArray[np.float64], unusual: NDArray[np.float64]) -> float:
    """The chance that a random unusual image has more bits/dim than a random usual one, ties counting half."""
    ordered = np.sort(usual)
    below, to = np.searchsorted(ordered, unusual, "left"), np.searchsorted(ordered, unusual, "right")
    return float((below + to).mean() / (2 * len(usual)))


def tile(image: UInt8[np.ndarray, "C H W"]) -> bytes:
    """An image file of one picture: PNG, or of larger ones WebP, reduced."""
    picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    if max(picture.size) <= TILE // 2:
        return png_bytes(picture)
    picture.thumbnail((TILE, TILE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=90)
    return file.getvalue()


def _pairs(model: LoadedModel, data: DataSet) -> list[tuple[bytes, bytes]]:
    originals, pictures = _reconstructed(model, data, PAIRS)
    return [(tile(a), tile(b)) for a, b in zip(originals, pictures, strict=True)]


def _reconstructed(model: LoadedModel, data: DataSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images from all over, as the model saw them, and their reconstructions; each uint8 [B, C, H, W]."""
    ids = spread_ids(data.manifest.images, count, block=max(count // 16, 1))
    originals, pictures = model.reconstruct(data.images(ids), ids)
    return originals.cpu().numpy(), pictures.cpu().numpy()


def _paths(model: LoadedModel, data: DataSet) -> list[list[bytes]]:
    """Pictures along straight lines between the codes of two images, the images themselves at the ends."""
    ids = spread_ids(data.manifest.images, 2 * PATHS, block=1)
    ids = ids[: len(ids) // 2 * 2]
    images = data.images(ids)
    codes = model.encode(images, ids).mean
    seen, _ = model.reconstruct(images, ids)
    half, shares = len(ids) // 2, torch.linspace(0, 1, STEPS, device=codes.device)
    rows = []
    for i in range(half):
        line = torch.stack([codes[i].lerp(codes[half + i], float(share)) for share in shares])
        middle = model.scorer.pixels.to_uint8(model.decode(line)).cpu().numpy()
        ends = (seen[i].cpu().numpy(), seen[half + i].cpu().numpy())
        rows.append([tile(ends[0]), *(tile(picture) for picture in middle), tile(ends[1])])
    return rows


def _neighbours(
    model: LoadedModel, samples: Tensor, train: DataSet, held_out: DataSet | str | None, *, encoder: bool
) -> Neighbours:
    manifest = train.manifest
    ids = spread_ids(manifest.images, min(SEARCHED_IMAGES, max(SEARCHED_BYTES // manifest.dims, 1)))
    images = _as_seen(model, train, ids)
    flat = images.reshape(len(images), -1)
    queries = samples.cpu().numpy()
    index, distance = nearest(queries.reshape(len(queries), -1), flat)
    distances = [Distances("samples", distance)]
    if isinstance(held_out, DataSet):
        seen, pictures = _reconstructed(model, held_out, YARDSTICK_IMAGES)
        kinds = [("held-out images", seen), ("reconstructions", pictures)]
        for kind, array in kinds if encoder else kinds[:1]:
            distances.append(Distances(kind, nearest(array.reshape(len(array), -1), flat)[1]))
    order = np.argsort(distance, kind="stable")[:NEIGHBOURS]
    pairs = [(tile(queries[i]), tile(images[index[i]]), float(distance[i])) for i in order]
    return Neighbours(searched=len(ids), of=manifest.images, pairs=pairs, distances=distances)


def _as_seen(model: LoadedModel, data: DataSet, ids: NDArray[np.int64]) -> UInt8[np.ndarray, "B C H W"]:
    """The images at the grey levels, or as binary, as the model is given them."""
    parts = []
    pixels = model.scorer.pixels
    for some in np.array_split(ids, max(len(ids) // 1024, 1)):
        noise = evaluation_noise(some, device=model.device)
        images = torch.from_numpy(data.images(some)).to(model.device)
        levels = draw_levels(images, some, pixels=pixels, config=model.job.likelihood, noise=noise)
        parts.append(pixels.to_uint8(levels).cpu().numpy())
    return np.concatenate(parts)


def _scored(model: LoadedModel, source: Source, *, count: int) -> Scores:
    data = _reached(source.data)
    ids, added = spread_ids(data.manifest.images, count), model.scorer.pixels.density_bits_correction
    nats = []
    for start in range(0, len(ids), EVALUATION_BLOCK):
        some = ids[start : start + EVALUATION_BLOCK]
        nats.append(-model.log_likelihood_bound(data.images(some), some).double().cpu().numpy())
    bits = bits_per_dim(1.0, data.manifest.dims) * np.concatenate(nats) + added
    return Scores(kind=source.kind, data=data.bucket.url, bits=bits, of=data.manifest.images)


def _layers(
    model: LoadedModel, older: Sequence[Callable[[], LoadedModel]], data: DataSet, tell: Told
) -> list[tuple[int, LayerTotals]]:
    """Of each checkpoint, in the order of progress."""
    ids = spread_ids(data.manifest.images, LAYER_IMAGES)
    part = [(some, data.images(some)) for some in np.array_split(ids, max(len(ids) // EVALUATION_BLOCK, 1))]
    found = {model.record.images_seen: _layers_of(model, part, tell)}
    for load in older:
        try:
            one = load()
        except VaejobError:
            continue  # a damaged checkpoint is named among the run's problems
        found[one.record.images_seen] = _layers_of(one, part, tell)
    return sorted(found.items())


def _layers_of(model: LoadedModel, part: Blocks, tell: Told) -> LayerTotals:
    tell(f"measuring each layer of codes at the checkpoint of {model.record.images_seen:,} images")
    return layer_diagnostics(model.scorer, part, config=model.job.likelihood, device=model.device)


def _reached(data: DataSet | str) -> DataSet:
    if isinstance(data, str):
        raise DataError(data)
    return data


def _tried(attempt: Callable[[], Found]) -> Found | str:
    try:
        return attempt()
    except VaejobError as error:
        return str(error)
