"""Pictures on the way from one image to another."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vaejob.data.batches import DataSet
from vaejob.errors import DataError
from vaejob.loaded import LoadedModel


def interpolate(
    model: LoadedModel, data: DataSet, *, rows: int, steps: int, seed: int
) -> UInt8[Tensor, "rows*(steps+2) C H W"]:
    """Row by row: an image as the model saw it, the mean pictures of codes on the way to another, and that image.

    Codes lie on the straight line between the means of the two posteriors. Raises DataError for fewer than two images, RunError
    for a model without one code that follows from an image.
    """
    if data.manifest.images < 2:
        raise DataError(f"{data.bucket.url} has {data.manifest.images} images; a way from one to another needs 2")
    generator = np.random.default_rng(seed)
    pairs = np.stack([generator.choice(data.manifest.images, size=2, replace=False) for _ in range(rows)])
    known, found = np.unique(pairs, return_inverse=True)
    images, place = torch.from_numpy(data.images(known)), torch.from_numpy(found.reshape(rows, 2))
    codes = model.encode(images, known).mean
    originals, _ = model.reconstruct(images, known)
    way = model.between(codes[place[:, 0]], codes[place[:, 1]], steps=steps)
    ends = [originals[place[:, side]].unsqueeze(1) for side in (0, 1)]
    return torch.cat((ends[0], way, ends[1]), dim=1).flatten(0, 1)
