"""What vaejob serve answers is what the model says, of every family; what a family cannot do is refused in a line."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vaejob
from tests.test_every_family import FAMILIES, job_of
from tests.test_stability import pack_digits
from vaejob.errors import RunError
from vaejob.loaded import LoadedModel
from vaejob.serving.answers import answer


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("answers") / "digits")


@pytest.fixture(params=[family for family in FAMILIES if family != "two layers"])
def model(request: pytest.FixtureRequest, digits: Path, tmp_path: Path) -> LoadedModel:
    job = job_of(request.param, digits, tmp_path, "checkpoint.every_images=0", "training.images=64")
    return vaejob.load(vaejob.train(job))


def png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels(addresses: list[str]) -> np.ndarray:
    files = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in addresses]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)))[None] for file in files])


def test_answers_are_those_of_the_model(model: LoadedModel, digits: Path) -> None:
    data = vaejob.open_data(f"{digits}/test")
    images = data.images(np.arange(2))
    first, last = (png(image) for image in images)

    def asked(verb: str, **question: Any) -> dict[str, Any]:
        return answer(verb, json.dumps(question).encode(), model)

    np.testing.assert_array_equal(pixels(asked("sample", count=3, seed=5)["images"]), model.sample(3, seed=5).numpy())
    scored = asked("score", image=first, samples=7)
    assert scored["negative_bound_nats"] == pytest.approx(-float(model.log_likelihood_bound(images[:1], samples=7)))
    added = model.scorer.pixels.density_bits_correction if model.scorer.pixels.is_density else 0.0
    assert scored["bits_per_dim"] == pytest.approx(scored["negative_bound_nats"] / (64 * math.log(2)) + added)
    assert scored["density_bits_correction"] == (added or None)
    if model.job.model.family == "decoder-only":
        with pytest.raises(RunError, match="has no encoder: no code follows from an image; use sample or score"):
            asked("reconstruct", image=first)
    else:
        both = np.concatenate([part.numpy() for part in model.reconstruct(images[:1])])
        np.testing.assert_array_equal(pixels(asked("reconstruct", image=first)["images"]), both)
    if model.job.model.family in ("hierarchical", "decoder-only"):
        with pytest.raises(RunError, match="use sample"):
            asked("interpolate", first=first, last=last)
    else:
        way = pixels(asked("interpolate", first=first, last=last, steps=3)["images"])
        codes = model.encode(images).mean
        for picture, code in zip(way, (codes[0], (codes[0] + codes[1]) / 2, codes[1]), strict=True):
            expected = model.scorer.pixels.to_uint8(model.decode(code[None]))[0].numpy()
            assert np.abs(picture.astype(int) - expected).max() <= 1
