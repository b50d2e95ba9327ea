"""What the page and the API can ask of a model. Images come as files in base64, and go as PNG in data: addresses."""

import base64
import binascii
import io
import math
from typing import Annotated, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vaejob.data.decode import decode_image
from vaejob.errors import DataError, RunError
from vaejob.likelihood.units import bits_per_dim
from vaejob.loaded import LoadedModel

ImageFile = Annotated[str, Field(description="an image file (PNG, JPEG, WebP, ...) in base64")]


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Sample(_Question):
    """New pictures; the same for the same seed."""

    count: int = Field(16, ge=1, le=64)
    seed: int = Field(0, ge=0, lt=2**31)
    mean: bool = False
    """The mean picture of each code in place of pixels that are drawn."""

    def answer(self, model: LoadedModel) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "images": _pngs(model.sample(self.count, seed=self.seed, mean=self.mean).cpu().numpy()),
        }


class Reconstruct(_Question):
    """What the model sees of an image, and what it makes of the code that it draws for it."""

    image: ImageFile

    def answer(self, model: LoadedModel) -> dict[str, Any]:
        if not encodes(model):
            raise RunError(f"{model.address} has no encoder: no code follows from an image; use sample or score")
        image, changed = fitting(self.image, model.record.shape)
        seen, made = model.reconstruct(image[None])
        return {"changed": changed, "images": _pngs(np.concatenate([seen.cpu().numpy(), made.cpu().numpy()]))}


class Interpolate(_Question):
    """Mean pictures of codes on the straight line between those of two images, both ends included."""

    first: ImageFile
    last: ImageFile
    steps: int = Field(8, ge=2, le=32)

    def answer(self, model: LoadedModel) -> dict[str, Any]:
        (first, changed), (last, changed_too) = (fitting(file, model.record.shape) for file in (self.first, self.last))
        codes = model.encode(np.stack([first, last])).mean
        (way,) = model.between(codes[:1], codes[1:], steps=self.steps)
        return {"changed": [*changed, *changed_too], "images": _pngs(way.cpu().numpy())}


class Score(_Question):
    """A lower bound on log p(x) of an image: the ELBO, or with more samples the IWAE bound (Burda et al., 2016)."""

    image: ImageFile
    samples: int = Field(100, ge=1, le=5000)

    def answer(self, model: LoadedModel) -> dict[str, Any]:
        image, changed = fitting(self.image, model.record.shape)
        nats = -float(model.log_likelihood_bound(image[None], samples=self.samples))
        if not math.isfinite(nats):
            raise RunError(f"{model.address}: the bound of this image is not finite")
        pixels = model.scorer.pixels
        return {
            "bound": "elbo" if self.samples == 1 else "iwae",
            "samples": self.samples,
            "negative_bound_nats": nats,
            "bits_per_dim": bits_per_dim(nats, image.size)
            + (pixels.density_bits_correction if pixels.is_density else 0.0),
            "density": pixels.is_density,
            "density_bits_correction": pixels.density_bits_correction if pixels.is_density else None,
            "changed": changed,
        }


def encodes(model: LoadedModel) -> bool:
    """Whether codes follow from an image, so that it can be reconstructed."""
    return model.job.model.family != "decoder-only"


def interpolates(model: LoadedModel) -> bool:
    """Whether one code follows from an image, on a line to that of another."""
    return encodes(model) and model.job.model.family != "hierarchical"


QUESTIONS: dict[str, type[Sample | Reconstruct | Interpolate | Score]] = {
    "sample": Sample,
    "reconstruct": Reconstruct,
    "interpolate": Interpolate,
    "score": Score,
}


def answer(verb: str, body: bytes, model: LoadedModel) -> dict[str, Any]:
    """Raises DataError for what is wrong with the question or its image, RunError for what the model cannot do."""
    try:
        question = QUESTIONS[verb].model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{'.'.join(map(str, first['loc'])) or verb}: {first['msg']}") from None
    return question.answer(model)


def fitting(file: str, shape: tuple[int, int, int]) -> tuple[UInt8[np.ndarray, "C H W"], list[str]]:
    """The image in a model's shape, and a line for each thing that was done to it for that."""
    try:
        data = base64.b64decode(file.partition(",")[2] if file.startswith("data:") else file, validate=True)
    except binascii.Error:
        raise DataError("image: it is not base64") from None
    pixels = decode_image(data, "image")
    channels, height, width = shape
    changed = []
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    mode = "L" if channels == 1 else "RGB"
    if picture.mode != mode:
        changed.append(f"made {'grey' if channels == 1 else 'RGB'}")
        picture = picture.convert(mode)
    if picture.size != (width, height):
        changed.append(f"resized from {picture.height}x{picture.width} to {height}x{width}")
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1).copy(), changed


def _pngs(images: UInt8[np.ndarray, "B C H W"]) -> list[str]:
    """Pixel for pixel."""
    pngs = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "PNG")
        pngs.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return pngs
