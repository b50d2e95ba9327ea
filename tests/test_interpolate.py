"""From one image to another through their codes."""

from pathlib import Path

import numpy as np
import pytest
import torch

import vaejob
from tests.test_every_family import job_of
from tests.test_stability import pack_digits
from vaejob.errors import RunError
from vaejob.pictures.interpolate import interpolate


def test_ways_lead_straight_from_image_to_image(tmp_path: Path) -> None:
    digits = pack_digits(tmp_path / "digits")
    long = (
        "training.images=16000",
        "training.report_every_images=16000",
        "optimizer.learning_rate=0.01",
        "checkpoint.every_images=0",
    )
    vaejob.train(job_of("mlp", digits, tmp_path, *long))
    model, data = vaejob.load(str(tmp_path / "run")), vaejob.open_data(f"{digits}/test")
    rows = interpolate(model, data, rows=3, steps=3, seed=5).view(3, 5, 1, 8, 8)
    images = torch.from_numpy(data.images(np.arange(data.manifest.images)))
    seen, _ = model.reconstruct(images)
    for row in rows:
        codes = [model.encode(images[(seen == end).flatten(1).all(1)][:1]).mean for end in (row[0], row[-1])]
        assert not torch.equal(row[0], row[-1])
        assert (row[1].int() - row[3].int()).abs().max() > 8  # learnt enough to tell the ends apart
        for shown, code in zip(row[1:4], (codes[0], (codes[0] + codes[1]) / 2, codes[1]), strict=True):
            expected = model.scorer.pixels.to_uint8(model.decode(code))[0]
            assert (shown.int() - expected.int()).abs().max() <= 1  # a rounding, as batches differ


@pytest.mark.parametrize(("family", "why"), [("hierarchical", "several sizes"), ("latent table", "no encoder")])
def test_without_one_code_for_an_image_there_is_no_way(family: str, why: str, tmp_path: Path) -> None:
    digits = pack_digits(tmp_path / "digits")
    vaejob.train(job_of(family, digits, tmp_path, "training.images=128"))
    model, data = vaejob.load(str(tmp_path / "run")), vaejob.open_data(f"{digits}/test")
    with pytest.raises(RunError, match=why):
        interpolate(model, data, rows=1, steps=2, seed=0)
