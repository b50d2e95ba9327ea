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
from vaejob.errors import ConfigError, RunError


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


@pytest.mark.parametrize(
    "settings",
    [
        ("model.upper_latent=4", "model.upper_hidden=[8]", "objective.bound=iwae", "objective.samples=3"),
        ("model.family=tied", "likelihood.pixels=gaussian"),
        ("model.family=tied", "model.tied_layers=conv", "likelihood.pixels=discretized-gaussian"),
        ("model.family=conv", "likelihood.pixels=categorical", "likelihood.bits=3"),
        ("model.family=hierarchical", "model.layers=2x1,8x1", "model.width=8", "model.latent_channels=2",
         "likelihood.pixels=discretized-logistic-mixture", "likelihood.components=2"),
    ],
    ids=["two layers, IWAE", "tied, density", "tied convolutions", "conv, categorical", "hierarchical"],
)  # fmt: skip
def test_every_family_trains_resumes_and_is_scored_again(home: Path, settings: tuple[str, ...]) -> None:
    """The run's own held-out number is that of the loaded model, after a run that was made longer."""
    folder = home / "families" / str(abs(hash(settings)))
    job = ("quickstart", f"data.train={home}/digits/train", f"data.test={home}/digits/test", f"run.bucket={folder}",
           "run.name=run", "cluster.workers=0", *settings)  # fmt: skip
    vaejob.train(vaejob.load_config(*job, "training.images=600"))
    vaejob.train(vaejob.load_config(*job, "training.images=1200"))
    model, data = vaejob.load(str(folder / "run")), vaejob.open_data(str(home / "digits/test"))
    assert model.record.images_seen == 1200
    scored = model.evaluate(data)
    assert model.record.held_out is not None
    assert scored.negative_bound_nats == model.record.held_out["negative_bound_nats"]
    weighed = model.evaluate(data, samples=5)
    assert weighed.images == weighed.weighed_images == data.manifest.images
    assert 1 <= weighed.weights()["least_effective_samples"] <= weighed.weights()["effective_samples"] <= 5
    assert weighed.mean("negative_bound") < scored.mean("negative_bound")
    layers = model.layer_diagnostics(data)
    assert layers.images == data.manifest.images
    assert len(layers.rates) == (1 if {"model.family=tied", "model.family=conv"} & {*settings} else 2)
    assert model.sample(3).shape == (3, 1, 8, 8)
    seen, again = model.reconstruct(data.images(np.arange(4)))
    assert seen.shape == again.shape == (4, 1, 8, 8)
    if "model.family=hierarchical" in settings:
        with pytest.raises(RunError, match="codes of several sizes for each image"):
            model.encode(data.images(np.arange(4)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("model.family=tied", "likelihood.pixels=categorical"), "likelihood.pixels is categorical with model.family=tied"),
        (("model.upper_latent=4", "objective.free_bits_nats=0.5"), "objective.free_bits_nats is 0.5 with model.upper_latent=4"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_one_another_are_refused(home: Path, settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        vaejob.load_config("quickstart", *settings)
    assert "\n" not in str(refusal.value)
