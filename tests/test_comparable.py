"""Likelihoods carry what they are of, and runs whose likelihoods do not compare are told apart, in words and in JSON."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import vaejob
from vaejob.cli import look, use
from vaejob.cli.overview import Identity, comparable_groups, settings_in_use
from vaejob.config import LikelihoodConfig, ModelConfig, ObjectiveConfig
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.likelihood.pixels import make_pixels
from vaejob.model import build_model

app = typer.Typer()
for verb in (look.runs, look.show, use.evaluate):
    app.command()(verb)

RUNS = {
    "bits-4": ["likelihood.bits=4"],
    "bits-4-mixture": ["likelihood.pixels=discretized-logistic-mixture", "likelihood.bits=4"],
    "bits-5": ["likelihood.bits=5"],
    "density": ["likelihood.pixels=gaussian", "likelihood.bits=4"],
    "iwae": ["likelihood.bits=4", "training.evaluate_samples=3"],
    "other-data": ["likelihood.bits=4", "data.test={home}/fewer/test"],
    "static": ["likelihood.pixels=bernoulli", "likelihood.binarize=static"],
    "threshold": ["likelihood.pixels=bernoulli", "likelihood.binarize=threshold"],
    "one-bit": ["likelihood.bits=1"],
}


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None, result.exception
    return result.stdout


def said_json(*arguments: str) -> Any:
    return json.loads(said(*arguments, "--json"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each of RUNS, 128 images each."""
    folder = tmp_path_factory.mktemp("home")
    images = (load_digits().images * (255 / 16)).round().astype("uint8")[:, None]
    pack(ArraySource("digits", images[:300]), str(folder / "digits"), split="train=0.8,test=0.2")
    pack(ArraySource("fewer", images[300:350]), str(folder / "fewer"), split="test")
    pack(
        ArraySource("grey", np.full((80, 1, 8, 8), 100, dtype=np.uint8)),
        str(folder / "grey"),
        split="train=0.5,test=0.5",
    )
    for name, own in RUNS.items():
        train(folder, name, *(setting.format(home=folder) for setting in own))
    return folder


def train(home: Path, name: str, *settings: str, data: str = "digits", images: int = 128) -> str:
    return vaejob.train(
        vaejob.load_config(
            "quickstart", f"run.bucket={home}/{'runs' if data == 'digits' else data}", f"run.name={name}", f"data.train={home}/{data}/train",
            f"data.test={home}/{data}/test", "model.hidden=[8]", "model.latent=2", f"training.images={images}",
            "cluster.workers=0", *settings,
        )
    )  # fmt: skip


def groups(home: Path) -> dict[str, str]:
    return {run["name"]: run["comparable_group"] for run in said_json("runs", f"{home}/runs")}


def test_runs_that_do_not_compare_are_of_different_groups(home: Path) -> None:
    """The observation model may differ, and one bit is what a threshold at half leaves; nothing else may."""
    found = groups(home)
    assert found["bits-4"] == found["bits-4-mixture"] == "a"
    assert found["threshold"] == found["one-bit"] == "b"
    assert len(set(found.values())) == len(RUNS) - 2


def test_the_table_says_in_words_what_each_bound_is_of(home: Path) -> None:
    table = said("runs", f"{home}/runs")
    assert "not all comparable: only those of one letter are" in table
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip() and line.split()[0] in RUNS}
    held_out = vaejob.open_data(f"{home}/digits/test").manifest
    said_of = {line.split()[0]: line for line in table.splitlines() if f"data {held_out.fingerprint[:12]}" in line}
    for name, group in groups(home).items():
        assert f" {group} " in rows[name]
    of = f"of {held_out.images} images"
    assert said_of["a"] == f"a  -ELBO {of}, 4 bits, data {held_out.fingerprint[:12]}"
    assert said_of["b"] == f"b  -ELBO {of}, 1 bit, data {held_out.fingerprint[:12]}"
    assert sum("4 bits, densities" in line for line in said_of.values()) == 1
    assert sum("-IWAE-3 of" in line for line in said_of.values()) == 1
    assert sum("static binarisation" in line for line in said_of.values()) == 1


def test_runs_that_all_compare_are_one_group_without_a_warning(home: Path, tmp_path: Path) -> None:
    for name in ("bits-4", "bits-4-mixture"):
        (tmp_path / name).symlink_to(home / "runs" / name)
    table = said("runs", str(tmp_path))
    assert "not all comparable" not in table
    assert sum(line.startswith("a  -ELBO of") for line in table.splitlines()) == 1


def test_every_number_in_json_says_what_it_is_of(home: Path) -> None:
    """Fingerprint, split, binarisation, bits, observation model, bound, K, checkpoint and count; the same from each verb."""
    for name, own in RUNS.items():
        address = f"{home}/runs/{name}"
        shown, evaluated = (
            said_json("show", address),
            said_json("evaluate", address, "--samples", "3" if name == "iwae" else "1"),
        )
        (listed,) = [run for run in said_json("runs", f"{home}/runs") if run["name"] == name]
        job = vaejob.load(address).job
        assert job.data.test is not None
        manifest = vaejob.open_data(job.data.test).manifest
        expected = {
            "bound": "iwae" if name == "iwae" else "elbo",
            "samples": 3 if name == "iwae" else 1,
            "images": manifest.images,
            "split": "test",
            "fingerprint": manifest.fingerprint,
            "data": job.data.test,
            "pixels": job.likelihood.pixels,
            "bits": job.likelihood.bits,
            "binarize": job.likelihood.binarize,
            "density": name == "density",
        }
        assert own
        for numbers in (shown["held_out"], evaluated, listed["best"]["held_out"], shown["checkpoints"][-1]["held_out"]):
            assert {key: numbers[key] for key in expected} == expected
        assert evaluated["negative_bound_nats"] == shown["held_out"]["negative_bound_nats"]
        assert evaluated["checkpoint"] == shown["held_out"]["images_seen"] == listed["best"]["images_seen"]
        trained = vaejob.open_data(job.data.train).manifest
        assert (shown["train"]["split"], shown["train"]["fingerprint"]) == ("train", trained.fingerprint)


def test_a_density_is_called_one_and_may_exceed_one(home: Path) -> None:
    """Constant pictures under a Gaussian: positive log-density, so a negative -ELBO; the corrected bits stay above 0."""
    address = train(
        home, "constant", "likelihood.pixels=gaussian", "optimizer.learning_rate=0.01", data="grey", images=8000
    )
    numbers = said_json("evaluate", address)
    assert numbers["density"]
    assert numbers["density_bits_correction"] == pytest.approx(math.log2(15))
    assert numbers["negative_bound_nats"] < -50
    plain = numbers["negative_bound_nats"] / 64 / math.log(2)
    assert numbers["bits_per_dim"] == pytest.approx(plain + math.log2(15))
    assert numbers["bits_per_dim"] > 0.3 > plain
    words = said("evaluate", address)
    assert words.startswith("-ELBO       -")
    assert "nats (density)" in words
    assert "bits/dim (density + 3.9069)" in words
    assert "a density of x in [0, 1] that may exceed 1" in words
    assert "nats (density)" in said("show", address)
    assert said_json("show", address)["held_out"]["density"]
    assert "density" not in said("evaluate", f"{home}/runs/bits-4")


IDENTITIES = st.builds(
    Identity,
    bound=st.sampled_from(["elbo", "iwae"]),
    samples=st.integers(1, 3),
    images=st.integers(1, 2),
    data=st.sampled_from(["here", "there"]),
    split=st.sampled_from(["test", "validation"]),
    fingerprint=st.sampled_from(["f1", "f2"]),
    likelihood=st.builds(LikelihoodConfig, pixels=st.sampled_from(["gaussian", "categorical"]), bits=st.integers(1, 2)),
)


@given(st.lists(IDENTITIES, max_size=12))
def test_groups_are_those_of_equal_keys_and_the_first_is_the_largest(identities: list[Identity]) -> None:
    names = {str(i): identity for i, identity in enumerate(identities)}
    found = comparable_groups(names)
    assert found.keys() == names.keys()
    for one in names:
        for other in names:
            assert (found[one] == found[other]) == (names[one].comparable_key() == names[other].comparable_key())
    sizes = [list(found.values()).count(letter) for letter in sorted(set(found.values()))]
    assert sizes == sorted(sizes, reverse=True)


def test_letters_do_not_run_out() -> None:
    many = {str(k): Identity("iwae", k, 1, "here", "test", "f", LikelihoodConfig()) for k in range(60)}
    letters = list(comparable_groups(many).values())
    assert len(set(letters)) == 60
    assert (letters[0], letters[25], letters[26], letters[59]) == ("a", "z", "aa", "bh")


READ: set[str] = set()


class Spied(ModelConfig):
    """Notes which of its settings are asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name in ModelConfig.model_fields:
            READ.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("family", get_args(ModelConfig.model_fields["family"].annotation))
def test_shown_settings_are_those_that_the_family_reads(family: str) -> None:
    """A setting's description says whose it is; building every variant of the family reads these settings and no others."""
    READ.clear()
    for tied_layers in ("dense", "conv"):
        for upper_latent in (0, 2):
            config = Spied(
                family=family, layers="2x1,8x1", channels=[2, 2], upper_latent=upper_latent, tied_layers=tied_layers
            )
            build_model(config, shape=(1, 8, 8), output_planes=1, seed=0)
    assert settings_in_use(ModelConfig(family=family)).keys() == READ


@pytest.mark.parametrize("pixels", get_args(LikelihoodConfig.model_fields["pixels"].annotation))
def test_shown_settings_are_those_of_the_observation_model(pixels: str) -> None:
    config = LikelihoodConfig(pixels=pixels, binarize="static" if pixels == "bernoulli" else "none")
    found = settings_in_use(config).keys()
    assert {"pixels", "bits"} <= found
    assert ("components" in found) == hasattr(make_pixels(config), "components")
    assert ("binarize" in found) == hasattr(make_pixels(config), "binarize")


def test_shown_settings_of_the_objective_are_those_of_the_bound() -> None:
    assert "gradient" not in settings_in_use(ObjectiveConfig())
    assert settings_in_use(ObjectiveConfig(bound="iwae", samples=5))["gradient"] == "standard"


def test_show_leaves_out_settings_of_other_families(home: Path) -> None:
    words = said("show", f"{home}/runs/static")
    assert "hidden=[8]" in words
    assert "binarize=static" in words
    for other in ("layers=", "width=", "latent_channels=", "tied_layers=", "blocks=", "components=", "gradient="):
        assert other not in words
    assert "components=10" in said("show", f"{home}/runs/bits-4-mixture")
