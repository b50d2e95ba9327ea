"""What a decoder learns from codes that are drawn anew, drawn once, or learnt; and what an encoder adds.

Pictures have a known source: 4 Gaussian numbers decide 36 binary pixels.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

import vaejob
from tests.ranks import leave
from vaejob.cli.story_numbers import Score, Told, difference, factorised_marginal, findings, score
from vaejob.cli.terminal import Progress, what_it_is_of
from vaejob.config import JobConfig, LikelihoodConfig, parse_config
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.errors import ConfigError, RunError
from vaejob.likelihood.bounds import ONE_CODE, BoundTerms, NegativeELBO, importance_bound
from vaejob.likelihood.pixels import make_pixels
from vaejob.loaded import LoadedModel
from vaejob.metrics import LikelihoodTotals, RunningTotals
from vaejob.model.decoder_only import DecoderOnlyVAE
from vaejob.model.noise import LATENT, Noise, image_noise
from vaejob.training.step import make_optimizer, make_scorer, train_step
from vaejob.training.worker import Event

IDS = np.array([3, 0, 2])
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 1, 4, 4), dtype=np.uint8)
RECIPES = ["marginal", "random-pairing", "fixed-code", "latent-table", "vae", "tied"]


def job(pairing: str, *settings: str) -> JobConfig:
    text = """
run: {name: story, bucket: nowhere, seed: 7}
data: {train: nowhere}
model: {family: decoder-only, latent: 3, hidden: [7]}
likelihood: {pixels: bernoulli, binarize: threshold}
optimizer: {learning_rate: 0.01}
training: {images: 100}
"""
    return parse_config(text, [f"objective.pairing={pairing}", *settings])


def decoder_only(pairing: str, *settings: str, images: int = 4) -> tuple[NegativeELBO, DecoderOnlyVAE]:
    scorer = make_scorer(job(pairing, *settings), shape=(1, 4, 4), images=images)
    assert isinstance(scorer.vae, DecoderOnlyVAE)
    return scorer, scorer.vae


def keys(images: int, epoch: int = 0) -> Tensor:
    return image_noise(np.arange(images), seed=0, purpose="train", epoch=epoch, device="cpu").keys


# What is learnt


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred training and as many test pictures of the source, packed."""
    folder = tmp_path_factory.mktemp("story")
    chance = np.random.default_rng(1)
    weights = chance.normal(size=(4, 36))
    ones = chance.random((400, 36)) < 1 / (1 + np.exp(-4 * np.tanh(chance.normal(size=(400, 4)) @ weights)))
    pack(
        ArraySource("source", (255 * ones).astype("uint8").reshape(400, 1, 6, 6)),
        str(folder),
        split="train=0.5,test=0.5",
    )
    return folder


@pytest.fixture(scope="module")
def models(home: Path) -> dict[str, LoadedModel]:
    """Each recipe, trained for some hundred steps."""
    found = {}
    for name in RECIPES:
        job = (f"run.bucket={home}", f"data.train={home}/train", f"data.test={home}/test", "optimizer.learning_rate=0.01",
               "training.images=16000", "training.report_every_images=16000")  # fmt: skip
        sizes = () if name == "marginal" else ("model.hidden=[128]", "model.latent=24")
        found[name] = vaejob.load(vaejob.train(vaejob.load_config(f"story-{name}", *job, *sizes)))
    return found


@pytest.fixture(scope="module")
def scores(home: Path, models: dict[str, LoadedModel]) -> dict[str, dict[str, Score]]:
    train, test = vaejob.open_data(f"{home}/train"), vaejob.open_data(f"{home}/test")
    return {
        name: {
            "train": score(model, train, own_codes=model.job.objective.own_codes),
            "test": score(model, test),
            "marginal": score(model, test, samples=200),
        }
        for name, model in models.items()
    }


def pictures(home: Path, split: str) -> np.ndarray:
    data = vaejob.open_data(f"{home}/{split}")
    return data.images(np.arange(data.manifest.images)).reshape(-1, 36) > 127


def entropy(home: Path) -> float:
    """Of independent pixels, in nats: no model of independent pixels is below it on the training images."""
    p = pictures(home, "train").mean(0)
    return float(-sum(q * math.log(q) for q in (*p, *(1 - p)) if q > 0))


def mean(score: Score) -> float:
    return score.totals.mean("negative_bound")


def test_the_marginal_in_closed_form_is_that_of_counting(home: Path, models: dict[str, LoadedModel]) -> None:
    train, test = vaejob.open_data(f"{home}/train"), vaejob.open_data(f"{home}/test")
    p = (pictures(home, "train").sum(0) + 0.5) / (train.manifest.images + 1)
    for found, split in zip(factorised_marginal(models["vae"], train, train, test), ("train", "test"), strict=True):
        expected = -np.where(pictures(home, split), np.log(p), np.log(1 - p)).sum(1)
        np.testing.assert_allclose(found.nats, expected, rtol=1e-5)
        assert mean(found) == pytest.approx(expected.mean(), rel=1e-5)


def test_random_pairing_lands_on_the_factorised_marginal(home: Path, scores: dict[str, dict[str, Score]]) -> None:
    """And never below: given any code, pixels are independent."""
    for name in ("marginal", "random-pairing"):
        assert entropy(home) - 0.02 < mean(scores[name]["train"]) < entropy(home) + 0.3
        assert scores[name]["marginal"].totals.weights()["effective_samples"] > 100  # of 200: the code hardly matters


def test_no_code_drawn_without_the_image_is_better_than_the_entropy_of_pixels(
    home: Path, models: dict[str, LoadedModel]
) -> None:
    levels = torch.from_numpy(pictures(home, "train").astype(np.uint8)).view(-1, 1, 6, 6)
    for model in models.values():
        for z in torch.randn(50, *model.scorer.vae.latent_shape, generator=torch.Generator().manual_seed(0)):
            parameters = model.scorer.vae.decode(z[None]).expand(len(levels), 1, 6, 6)
            assert -model.scorer.pixels.log_prob(parameters, levels).mean() > entropy(home) - 1e-4


@pytest.mark.parametrize("name", ["fixed-code", "latent-table"])
def test_own_codes_memorise_and_a_fresh_one_is_worse_than_the_marginal(
    name: str, home: Path, scores: dict[str, dict[str, Score]]
) -> None:
    assert mean(scores[name]["train"]) < 0.5 * entropy(home)
    apart = difference(scores[name]["test"], scores["random-pairing"]["test"])
    assert apart.nats > 5
    assert apart.nats > 5 * apart.standard_error


def test_an_encoder_is_better_than_all_without(scores: dict[str, dict[str, Score]]) -> None:
    for name in RECIPES[:4]:
        for bound in ("test", "marginal"):
            apart = difference(scores["vae"][bound], scores[name][bound])
            assert apart.nats < -3 * apart.standard_error < 0


def test_tying_halves_the_weights_at_about_the_same_likelihood(
    models: dict[str, LoadedModel], scores: dict[str, dict[str, Score]]
) -> None:
    tied, untied = (sum(p.numel() for p in models[name].scorer.parameters()) for name in ("tied", "vae"))
    assert untied - tied == 36 * 128 + 128 * 24 - 2  # each weight once, and a gain for each layer
    assert abs(difference(scores["tied"]["marginal"], scores["vae"]["marginal"]).nats) < 1.5


def test_the_recipes_differ_in_what_they_are_about_alone() -> None:
    """One decoder of 8x8 digits for all that have one, half the weights where they are tied, one budget and one likelihood."""
    jobs = {name: vaejob.load_config(f"story-{name}") for name in RECIPES}
    for section in ("data", "likelihood", "optimizer", "training", "checkpoint", "cluster"):
        assert len({getattr(one, section).model_dump_json() for one in jobs.values()}) == 1
    sizes = {}
    for name, one in jobs.items():
        scorer = make_scorer(one, shape=(1, 8, 8), images=1444)
        sizes[name] = sum(p.numel() for p in scorer.parameters())
        if name not in ("marginal", "tied"):
            assert sum(p.numel() for n, p in scorer.named_parameters() if "decoder" in n or "output" in n) == 86592
    assert sizes["marginal"] == 2 + 2 * 64
    assert sizes["latent-table"] - sizes["fixed-code"] == 1444 * 16
    assert sizes["tied"] / sizes["vae"] == pytest.approx(0.5, abs=0.02)


def test_a_score_is_the_number_of_evaluate(home: Path, models: dict[str, LoadedModel]) -> None:
    data = vaejob.open_data(f"{home}/test")
    for samples in (1, 20):
        assert score(models["fixed-code"], data, samples=samples).totals == models["fixed-code"].evaluate(
            data, samples=samples
        )


def test_a_difference_is_of_the_same_images() -> None:
    one, other = (Score(LikelihoodTotals(), np.array(nats)) for nats in ([1.0, 5.0, 9.0], [2.0, 5.0, 13.0]))
    found = difference(one, other)
    assert found.nats == pytest.approx(-5 / 3)
    assert found.standard_error == pytest.approx(math.sqrt((1 + 0 + 16) / 3 - 25 / 9) / math.sqrt(3))


def row(title: str, *, train: float, test: float, marginal: float, parameters: int = 100, ess: float = 50.0) -> Told:
    """Of 100 images, whose nats are spread by 1 around the means."""

    def scored(nats: float, *, weights: bool = False) -> Score:
        each = nats + torch.linspace(-1, 1, 100, dtype=torch.float64)
        totals = RunningTotals(dims_per_image=36, device="cpu")
        terms, effective = BoundTerms(each, torch.zeros(100, 1)), torch.full((100,), ess) if weights else None
        totals.add(terms, effective_samples=effective, samples=100)
        # One model's images are spread the other way, so that differences have a standard error of some tenths.
        return Score(totals.to_host(), each.numpy() if title == "closed form" else each.flip(0).numpy())

    return Told(title, "", 1, parameters, False, scored(train), scored(test), scored(marginal, weights=True))


@pytest.mark.parametrize(
    ("of", "changed", "says"),
    [
        ("random-pairing", {}, "Random pairing lands on the factorised marginal: +0.100 ± 0.117 nats on the training"),
        ("random-pairing", {"train": 28.0}, "Random pairing is not on the factorised marginal: +3.000"),
        ("fixed-code", {}, "Fixed codes memorise. To the factorised marginal: -15.000 ± 0.117 nats for training images"),
        ("fixed-code", {"train": 24.8}, "Fixed codes do not fit their images yet."),
        ("fixed-code", {"test": 25.1}, "Fixed codes fit their images, and a fresh one fits test images no worse"),
        ("latent-table", {"ess": 3.0}, "by the -IWAE bound over many, worth 3.0 codes alone."),
        ("latent-table", {}, "by the -IWAE bound over many."),
        ("encoder", {}, "The encoder closes the loop: on test images the best without one is +5.100 ± 0.000 nats from it"),
        ("encoder", {"test": 30.0}, "The encoder gains nothing yet: on test images the best without one is -4.900"),
        ("tying", {}, "Tying saves 40% of the VAE's parameters; the -ELBO of test images changes by +0.000 ± 0.000 nats"),
    ],
)  # fmt: skip
def test_findings_say_what_the_numbers_say(of: str, changed: dict[str, float], says: str) -> None:
    numbers = {
        "closed-form": ("closed form", {"train": 25.0, "test": 25.0, "marginal": 25.0}),
        "story-marginal": ("marginal", {"train": 25.0, "test": 25.2, "marginal": 25.2}),
        "story-random-pairing": ("random pairing", {"train": 25.1, "test": 25.1, "marginal": 25.1}),
        "story-fixed-code": ("fixed code", {"train": 10.0, "test": 40.0, "marginal": 24.0}),
        "story-latent-table": ("latent table", {"train": 5.0, "test": 60.0, "marginal": 24.5}),
        "story-vae": ("VAE", {"train": 18.0, "test": 20.0, "marginal": 19.0}),
        "story-tied": ("tied VAE", {"train": 18.0, "test": 20.0, "marginal": 19.0, "parameters": 60}),
    }
    name = {"encoder": "story-vae", "tying": "story-tied"}.get(of, f"story-{of}")
    rows = {key: row(title, **(nats | (changed if key == name else {}))) for key, (title, nats) in numbers.items()}  # type: ignore[arg-type]
    (found,) = [one for one in findings(rows) if one.of == of]
    assert says in found.text


# Codes


def test_a_code_belongs_to_seed_and_image_in_any_batch() -> None:
    _, vae = decoder_only("fixed-code", "model.latent=5")
    whole = vae.own_codes(torch.arange(1000))
    assert torch.equal(whole[IDS], vae.own_codes(torch.from_numpy(IDS)))
    assert torch.equal(whole, image_noise(np.arange(1000), seed=7, purpose="code", device="cpu").normal(LATENT, (5,)))
    assert not torch.equal(
        whole, decoder_only("fixed-code", "model.latent=5", "run.seed=8")[1].own_codes(torch.arange(1000))
    )
    assert abs(whole.mean()) < 0.05  # 5 / sqrt(5000) is 0.07
    assert whole.square().mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("pairing", ["fixed-code", "latent-table"])
def test_an_own_code_is_the_same_in_every_epoch_and_a_fresh_one_is_not(pairing: str) -> None:
    def distortions(pairing: str) -> list[Tensor]:
        config = job(pairing)
        scorer = make_scorer(config, shape=(1, 4, 4), images=4)
        return [
            train_step(
                scorer, torch.optim.SGD(scorer.parameters(), lr=0), torch.from_numpy(IMAGES), IDS,
                job=config, pixels=scorer.pixels, epoch=epoch, beta=1.0, learning_rate=0.0, weight=1 / 3,
            ).bound.distortion
            for epoch in range(2)
        ]  # fmt: skip

    assert torch.equal(*distortions(pairing))
    assert not torch.equal(*distortions("random"))


def test_rows_of_the_table_start_at_the_drawn_codes_and_are_projected_into_a_ball() -> None:
    _, vae = decoder_only("latent-table", images=200)
    drawn = decoder_only("fixed-code")[1].own_codes(torch.arange(200))
    assert vae.table is not None
    assert torch.equal(vae.table, drawn)
    projected = vae.own_codes(torch.arange(200))
    inside = drawn.norm(dim=1) <= math.sqrt(3)
    assert 50 < inside.sum() < 150
    assert torch.equal(projected[inside], drawn[inside])
    torch.testing.assert_close(projected[~inside], math.sqrt(3) * nn.functional.normalize(drawn[~inside]))
    # On the sphere nothing is gained by growing: the gradient has no part along the row.
    projected.sin().sum().backward()  # type: ignore[no-untyped-call]
    assert vae.table.grad is not None
    along = (vae.table.grad * nn.functional.normalize(drawn)).sum(1)
    torch.testing.assert_close(along[~inside], torch.zeros_like(along[~inside]), atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.table.grad[inside], drawn[inside].cos())


def test_only_the_rows_of_a_batch_get_a_gradient() -> None:
    scorer, vae = decoder_only("latent-table", images=6)
    levels = torch.from_numpy(IMAGES) >> 7
    scorer(levels, keys(3), ONE_CODE, torch.from_numpy(IDS)).distortion.sum().backward()
    assert vae.table is not None
    assert vae.table.grad is not None
    assert vae.table.grad.any(1).tolist() == [True, False, True, True, False, False]


def test_a_rank_without_images_moves_nothing_but_takes_part() -> None:
    scorer, _ = decoder_only("latent-table")
    none = torch.zeros(0, 1, 4, 4, dtype=torch.uint8)
    scorer(none, keys(0), ONE_CODE, torch.zeros(0, dtype=torch.int64)).distortion.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in scorer.parameters())


# Bounds


def test_bounds_without_an_encoder_are_sampling_from_the_prior() -> None:
    """Against brute force, and against an integral over the one dimension of the code."""
    scorer, vae = decoder_only("random", "model.latent=1")
    nn.init.normal_(vae.output.weight, std=2.0, generator=torch.Generator().manual_seed(0))
    levels, noise = torch.from_numpy(IMAGES) >> 7, Noise(keys(3))

    def log_prob(z: Tensor) -> Tensor:
        parameters = vae.decode(z)
        return torch.stack([scorer.pixels.log_prob(parameters, one.expand(len(z), 1, 4, 4)) for one in levels], dim=1)

    terms = scorer(levels, noise.keys)
    assert not terms.rate.any()
    torch.testing.assert_close(terms.distortion, -log_prob(noise.normal(LATENT, (1,))).diagonal())
    samples = 4000
    bound, ess = importance_bound(vae, scorer.pixels, levels, noise, samples=samples)
    each = log_prob(noise.folds(range(samples)).normal(LATENT, (1,))).view(samples, 3, 3).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(bound, each.double().logsumexp(0) - math.log(samples), rtol=1e-5, atol=0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(128)
    exact = (
        log_prob(torch.from_numpy(nodes).float()[:, None]).double()
        + torch.from_numpy(np.log(weights / weights.sum()))[:, None]
    ).logsumexp(0)
    standard_error = (1 / ess - 1 / samples).sqrt()
    assert ((bound - exact).abs() < 4 * standard_error).all()
    assert standard_error.max() < 0.1


@pytest.mark.parametrize(
    "pixels",
    ["bernoulli", "continuous-bernoulli", "categorical", "discretized-logistic", "discretized-logistic-mixture",
     "discretized-gaussian", "gaussian"],
)  # fmt: skip
def test_every_observation_model_starts_at_the_mean_picture(pixels: Any) -> None:
    config = job("latent-table").model_copy(
        update={
            "likelihood": LikelihoodConfig(
                pixels=pixels, bits=3, binarize="threshold" if pixels == "bernoulli" else "none"
            )
        }
    )
    scorer = make_scorer(config, shape=(1, 4, 4), images=4)
    initial = make_pixels(config.likelihood).initial_parameters(
        torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    )
    scorer.vae.set_output_bias(initial)
    torch.testing.assert_close(scorer.vae.decode(torch.zeros(1, 3))[0], initial)
    step = train_step(
        scorer, make_optimizer(config.optimizer, scorer), torch.from_numpy(IMAGES), IDS,
        job=config, pixels=scorer.pixels, epoch=0, beta=1.0, learning_rate=0.01, weight=1 / 3,
    )  # fmt: skip
    assert step.objective_nats.isfinite()
    assert scorer.vae.generate(Noise(keys(2))).shape == (2, scorer.pixels.parameters(1), 4, 4)


# Jobs


def table_after_two_steps(first: int, end: int, *, world_size: int = 1) -> dict[str, Tensor]:
    """Weights of a rank that holds images [first, end) of both batches."""
    torch.set_num_threads(1)
    config = job("latent-table")
    scorer = make_scorer(config, shape=(1, 4, 4), images=5)
    model: nn.Module = scorer
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(scorer, gradient_as_bucket_view=True, static_graph=True)
    optimizer = make_optimizer(config.optimizer, scorer)
    for epoch in range(2):
        train_step(
            model, optimizer, torch.from_numpy(IMAGES[first:end]), IDS[first:end],
            job=config, pixels=scorer.pixels, epoch=epoch, beta=1.0, learning_rate=0.01, weight=world_size / len(IDS),
        )  # fmt: skip
    return scorer.state_dict()


def one_rank(rank: int, world_size: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    cuts = [0, 1, 3]
    torch.save(table_after_two_steps(cuts[rank], cuts[rank + 1], world_size=world_size), Path(folder) / f"{rank}.pt")
    leave()


def test_ranks_move_the_table_like_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, args=(2, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    whole = table_after_two_steps(0, 3)
    start = make_scorer(job("latent-table"), shape=(1, 4, 4), images=5).state_dict()["vae.table"]
    assert (whole["vae.table"] != start).all(1).tolist() == [True, False, True, True, False]
    for rank in range(2):
        split = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, weight in whole.items():
            torch.testing.assert_close(split[name], weight, rtol=1e-5, atol=1e-6)


def test_a_resumed_table_is_that_of_an_uninterrupted_run(home: Path, tmp_path: Path) -> None:
    settings = (f"run.bucket={tmp_path}", f"data.train={home}/train", f"data.test={home}/test", "model.hidden=[8]",
                "model.latent=3", "optimizer.schedule=constant")  # fmt: skip
    jobs = {
        name: vaejob.load_config(
            "story-latent-table",
            *settings,
            f"run.name={name}",
            "training.images=1000",
            "training.report_every_images=300",
        )
        for name in ("whole", "resumed")
    }
    vaejob.train(jobs["whole"])
    vaejob.train(jobs["resumed"], should_stop=lambda: True)  # at its first batch
    assert 0 < vaejob.load(str(tmp_path / "resumed")).record.images_seen < 300
    vaejob.train(jobs["resumed"])
    whole, resumed = (vaejob.load(str(tmp_path / name)) for name in ("whole", "resumed"))
    assert resumed.record.files[0].sha256 == whole.record.files[0].sha256  # weights and moments
    assert whole.scorer.state_dict()["vae.table"].shape == (vaejob.open_data(f"{home}/train").manifest.images, 3)


def test_a_model_without_encoder_is_used_from_its_address_alone(home: Path, models: dict[str, LoadedModel]) -> None:
    images = vaejob.open_data(f"{home}/test").images(np.arange(4))
    for name in RECIPES[:4]:
        model = models[name]
        assert model.sample(3).shape == (3, 1, 6, 6)
        seen, drawn = model.reconstruct(images)
        assert seen.shape == drawn.shape == images.shape
        assert torch.equal(drawn, model.reconstruct(255 - images)[1])  # whatever the picture
        with pytest.raises(RunError, match="has no encoder: no code follows from an image"):
            model.encode(images)


def test_a_likelihood_given_own_codes_is_never_called_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    totals = LikelihoodTotals(images=4, dims=64, negative_bound_nats=16.0)
    said = what_it_is_of(job("fixed-code"), totals, samples=1, data="d", fingerprint="f", own_codes=True)
    assert "conditional on each image's own code: no bound on log p(x)" in said
    assert "ELBO" not in said
    row = {"split": "train", "images_seen": 50, "attempt": "a", "attempt_started_at_images": 0, "seconds": 2.0}
    for pairing, told in (("fixed-code", True), ("random", False)):
        Progress(job(pairing), quiet=False)(Event("row", {**row, **totals.to_dict()}))
        assert ("given own codes" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["objective.pairing=encoder"], "objective.pairing is encoder with model.family=decoder-only, which has none; it must be random, fixed-code or latent-table"),
        (["model.family=mlp"], "objective.pairing is fixed-code with model.family=mlp, .* it must be encoder, or model.family=decoder-only"),
        (["objective.samples=5"], "objective.samples=5 and pairing=fixed-code, .* must be elbo and 1"),
        (["objective.bound=iwae"], "objective.bound is iwae .* pairing=fixed-code, .* must be elbo and 1"),
        (["objective.pairing=latent-table", "optimizer.weight_decay=0.1"], "optimizer.weight_decay is 0.1 with objective.pairing=latent-table, .* it must be 0"),
        (["objective.pairing=learnt"], "objective.pairing is 'learnt'; it must be 'encoder', 'random', 'fixed-code' or 'latent-table'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named_with_what_would(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        job("fixed-code", *settings)
    assert "\n" not in str(refusal.value)


def test_a_table_that_no_worker_could_hold_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"latent-table for 10000000 images with model.latent=50; .* at most 268435456"
    ):
        decoder_only("latent-table", "model.latent=50", images=10**7)
