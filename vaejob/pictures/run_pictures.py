"""The pictures that a run leaves in its bucket: samples, reconstructions, and both side by side."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vaejob.data.batches import open_data
from vaejob.loaded import LoadedModel, load
from vaejob.metrics import LikelihoodTotals
from vaejob.pictures.grid import BACKGROUND, above, beside, grid, png_bytes
from vaejob.storage import join, open_bucket

COLUMNS = 8
SAMPLES = 64
RECONSTRUCTIONS = 32
MARGIN = 28
INK, GREY = (28, 30, 34), (110, 114, 122)


def write_run_pictures(address: str) -> dict[str, str]:
    """Draws the run's newest checkpoint; the pictures' names and addresses. Needs the run's held-out or training data."""
    model = load(address)
    samples = model.sample(SAMPLES, mean=True)
    originals, reconstructions = reconstruct_some(model, model.job.data.test or model.job.data.train, RECONSTRUCTIONS)
    pictures = {
        "samples": grid(samples, columns=COLUMNS),
        "reconstructions": beside(originals, reconstructions),
        "samples-beside-reconstructions": _side_by_side(
            model, grid(samples, columns=COLUMNS), above(originals, reconstructions, columns=COLUMNS)
        ),
    }
    run = open_bucket(address)
    for name, picture in pictures.items():
        run.write(f"pictures/{name}.png", png_bytes(picture))
    return {name: join(run.url, "pictures", f"{name}.png") for name in pictures}
