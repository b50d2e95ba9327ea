"""The pictures that a run leaves in its bucket: samples, reconstructions, and both side by side."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vaejob.data.batches import DataSet, open_data
from vaejob.loaded import LoadedModel, load
from vaejob.metrics import LikelihoodTotals
from vaejob.pictures.grid import above, beside, grid, png_bytes
from vaejob.storage import join, open_bucket

COLUMNS = 8
SAMPLES = 64
RECONSTRUCTIONS = 32
MARGIN, GUTTER = 36, 48
HALF_WIDTH, MIN_WIDTH = 650, 960
PAPER, INK, GREY = (255, 255, 255), (24, 26, 30), (112, 116, 124)


def write_run_pictures(address: str) -> dict[str, str]:
    """Draws the run's newest checkpoint; the pictures' names and addresses. Its held-out, or else training, data is read."""
    model = load(address)
    samples = model.sample(SAMPLES, mean=True)
    originals, reconstructions = reconstruct_some(
        model, open_data(model.job.data.test or model.job.data.train), RECONSTRUCTIONS
    )
    pictures = {
        "samples": grid(samples, columns=COLUMNS),
        "reconstructions": beside(originals, reconstructions),
        "samples-beside-reconstructions": _sheet(
            model,
            grid(samples, columns=COLUMNS, max_width=HALF_WIDTH),
            above(originals, reconstructions, columns=COLUMNS, max_width=HALF_WIDTH),
        ),
    }
    run = open_bucket(address)
    for name, picture in pictures.items():
        run.write(f"pictures/{name}.png", png_bytes(picture))
    return {name: join(run.url, "pictures", f"{name}.png") for name in pictures}


def reconstruct_some(model: LoadedModel, data: DataSet, count: int) -> tuple[Tensor, Tensor]:
    """Images from all over a data set, as the model saw them, and their reconstructions."""
    ids = np.unique(np.linspace(0, data.manifest.images - 1, num=count).astype(np.int64))
    return model.reconstruct(torch.from_numpy(data.images(ids)), ids)


def _sheet(model: LoadedModel, samples: Image.Image, reconstructions: Image.Image) -> Image.Image:
    """Samples at the left, originals over reconstructions at the right, and below them which model this is."""
    head, foot = 80, 92
    right = MARGIN + samples.width + GUTTER
    height = max(samples.height, reconstructions.height)
    width = max(right + reconstructions.width + MARGIN, MIN_WIDTH)
    sheet = Image.new("RGB", (width, head + height + foot), PAPER)
    draw, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(24), ImageFont.load_default(15)
    images = "held-out" if model.job.data.test else "training"
    for left, picture, title, caption in (
        (MARGIN, samples, "Samples", "mean pictures decoded from random codes"),
        (right, reconstructions, "Reconstructions", f"{images} images, each above what its code decodes to"),
    ):
        draw.text((left, 18), title, fill=INK, font=large)
        draw.text((left, 50), caption, fill=GREY, font=small)
        sheet.paste(picture, (left, head))
    draw.text((MARGIN, head + height + 22), _which_model(model), fill=INK, font=small)
    draw.text((MARGIN, head + height + 46), _how_likely(model), fill=GREY, font=small)
    return sheet


def _which_model(model: LoadedModel) -> str:
    return f"{model.job.run.name} after {model.record.images_seen:,} images"


def _how_likely(model: LoadedModel) -> str:
    """The held-out bound with what makes it comparable; empty if there was none."""
    if model.record.held_out is None:
        return ""
    totals, job = LikelihoodTotals.from_dict(model.record.held_out), model.job
    if totals.non_finite:
        return f"the bound of {totals.non_finite:,} of {totals.images:,} held-out images is not finite"
    samples, likelihood = job.training.evaluate_samples, job.likelihood
    bound = "-ELBO" if samples == 1 else f"-IWAE bound of {samples} samples"
    kind = f"{likelihood.binarize} binarisation" if likelihood.pixels == "bernoulli" else f"{likelihood.bits} bits"
    pixels = model.scorer.pixels
    density = " (density)" if pixels.is_density else ""
    corrected = f" (density + {pixels.density_bits_correction:.4f})" if pixels.is_density else ""
    return (
        f"{totals.bits_per_dim + pixels.density_bits_correction:.4f} ± {totals.bits_per_dim_standard_error:.4f} bits/dim{corrected}, "
        f"{totals.mean('negative_bound'):.3f} ± {totals.standard_error('negative_bound'):.3f} nats{density}: "
        f"{bound} of {totals.images:,} held-out images, {likelihood.pixels} pixels, {kind}"
    )
