"""A trained model in Python, from its run's address."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import vaejob
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packed digits and a short run on them."""
    folder = tmp_path_factory.mktemp("home")
    images = (load_digits().images * (255 / 16)).round().astype("uint8")[:, None]
    pack(ArraySource("digits", images), str(folder / "digits"), split="train=0.8,test=0.2")
    data = (f"data.train={folder}/digits/train", f"data.test={folder}/digits/test")
    vaejob.train(
        vaejob.load_config(
            "quickstart", *data, f"run.bucket={folder}", "run.name=run", "training.images=20000", "cluster.workers=0"
        )
    )
    return folder


def test_images_codes_and_pictures_fit_one_another(home: Path) -> None:
    model = vaejob.load(str(home / "run"))
    images = vaejob.open_data(str(home / "digits/test")).images(np.arange(5))
    posterior = model.encode(images)
    assert posterior.mean.shape == posterior.log_std.shape == (5, 16)
    decoded = model.decode(posterior.mean)
    assert decoded.shape == (5, 1, 8, 8)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    # A trained model tells the digits apart: each picture is nearest to the one it was decoded from.
    distances = torch.cdist(decoded.flatten(1), torch.from_numpy(images).float().flatten(1) / 255)
    assert distances.argmin(1).tolist() == [0, 1, 2, 3, 4]
    samples = model.sample(7, seed=3)
    assert (samples.shape, samples.dtype) == ((7, 1, 8, 8), torch.uint8)
    assert torch.equal(samples, model.sample(7, seed=3))
    assert not torch.equal(samples, model.sample(7, seed=4))


def test_bounds_of_single_images_add_up_to_the_runs_own_number(home: Path) -> None:
    model = vaejob.load(str(home / "run"))
    data = vaejob.open_data(str(home / "digits/test"))
    ids = np.arange(data.manifest.images)
    bounds = model.log_likelihood_bound(data.images(ids), ids)
    assert model.record.held_out is not None
    assert -bounds.double().sum().item() == pytest.approx(model.record.held_out["negative_bound_nats"], rel=1e-6)
    tighter = model.log_likelihood_bound(data.images(ids), ids, samples=32)
    assert tighter.mean() > bounds.mean()
    one = model.log_likelihood_bound(data.images(ids[9:10]), ids[9:10])
    torch.testing.assert_close(one, bounds[9:10])


def test_loading_and_using_a_model_needs_no_ray(home: Path) -> None:
    program = f"""
import sys
sys.modules["ray"] = None  # importing it would raise
import vaejob
model = vaejob.load({str(home / "run")!r})
images = vaejob.open_data({str(home / "digits/test")!r}).images([0, 1])
model.decode(model.encode(images).mean)
model.sample(2)
print(model.log_likelihood_bound(images).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2])" in done.stdout
