"""An exported folder is the run's model, without the run, and without vaejob."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vaejob
from tests.test_every_family import FAMILIES, job_of
from tests.test_stability import pack_digits
from vaejob.errors import CheckpointError, RunError, UserError
from vaejob.export import code_shapes, export, programs
from vaejob.likelihood.bounds import importance_bound
from vaejob.loaded import LoadedModel
from vaejob.model.noise import BINARIZE, LATENT, Noise, image_noise
from vaejob.training.step import evaluation_noise

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

WITHOUT_VAEJOB = """
import sys
sys.modules["vaejob"] = None
import torch
from safetensors.torch import load_file, save_file
torch.set_grad_enabled(False)
given = load_file("given.safetensors")
waiting = {kind: [given[name] for name in sorted(given) if name.startswith(kind)] for kind in ("randn", "rand_")}
def drawn(kind, shape):
    number = waiting[kind].pop(0)
    assert number.shape == shape, (number.shape, shape)
    return number
torch.randn = lambda *shape: drawn("randn", shape)
torch.rand = lambda shape: drawn("rand_", shape)
"""
SAVED = """
names = "pictures", "parameters", "images", "levels", "code", "reconstructions", "elbo", "iwae"
save_file({name: globals()[name].contiguous() for name in names if name in globals()}, "found.safetensors")
assert len(weights) > 0
try:
    import vaejob
except ImportError:
    pass
else:
    raise AssertionError("vaejob was there")
"""

PIXELS = {
    "bernoulli": ("likelihood.pixels=bernoulli", "likelihood.binarize=threshold"),
    "static": ("likelihood.pixels=bernoulli", "likelihood.binarize=static"),
    "continuous-bernoulli": ("likelihood.pixels=continuous-bernoulli",),
    "categorical": ("likelihood.pixels=categorical", "likelihood.bits=2"),
    "discretized-logistic": ("likelihood.pixels=discretized-logistic", "likelihood.bits=4"),
    "mixture": ("likelihood.pixels=discretized-logistic-mixture", "likelihood.components=3", "likelihood.bits=5"),
    "discretized-gaussian": ("likelihood.pixels=discretized-gaussian", "likelihood.bits=3"),
    "gaussian": ("likelihood.pixels=gaussian",),
}
OTHER_PIXELS = [(family, "bernoulli") for family in FAMILIES]
OTHER_PIXELS += [(family, "discretized-logistic" if "tied" in family else "mixture") for family in FAMILIES]
OTHER_PIXELS += [("mlp", pixels) for pixels in PIXELS if pixels not in ("bernoulli", "mixture")]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("digits"))


def trained(family: str, digits: Path, bucket: Path, *overrides: str) -> LoadedModel:
    vaejob.train(job_of(family, digits, bucket, "training.images=128", *overrides))
    return vaejob.load(str(bucket / "run"))


def numbers_of(noise: Noise, shapes: list[tuple[int, ...]]) -> Tensor:
    """What vaejob itself draws for the layers of a code, in the order that programs want."""
    return torch.cat([noise.normal(LATENT + layer, shape).flatten(1) for layer, shape in enumerate(shapes)], dim=1)


def run_the_card(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the card's lines of plain torch find where vaejob is not, with these in place of random numbers."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    (lines,) = [block for block in blocks if "vaejob" not in block]
    save_file(given, folder / "given.safetensors")
    code = WITHOUT_VAEJOB + lines + SAVED
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return load_file(folder / "found.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_export_scores_and_samples_bit_for_bit_without_its_bucket(family: str, digits: Path, tmp_path: Path) -> None:
    model = trained(family, digits, tmp_path / "bucket")
    export(model, tmp_path / "out", numbers="")
    shutil.rmtree(tmp_path / "bucket")
    again, data = vaejob.load(str(tmp_path / "out")), vaejob.open_data(f"{digits}/test")
    assert again.evaluate(data).to_dict() == model.evaluate(data).to_dict()
    assert torch.equal(again.sample(5, seed=2), model.sample(5, seed=2))
    lines_of_the_card_agree(model, tmp_path / "out")


def lines_of_the_card_agree(model: LoadedModel, folder: Path) -> None:
    """With vaejob's own pictures, bounds and reconstructions, for the random numbers that vaejob draws."""
    shapes, ids = code_shapes(model), np.arange(16)
    noise = evaluation_noise(ids, device=torch.device("cpu"))
    given = {"randn-00": numbers_of(image_noise(ids, seed=0, purpose="sample", device="cpu"), shapes)}
    given |= {f"randn-{draw + 1:02}": numbers_of(noise.fold(draw), shapes) for draw in range(10)}
    thresholds = noise
    if model.job.likelihood.binarize == "static":
        thresholds = image_noise(ids, seed=0, purpose="static", device="cpu")
    given["rand_"] = thresholds.uniform(BINARIZE, model.record.shape)
    found = run_the_card(folder, given)
    pixels = model.scorer.pixels
    assert (pixels.to_uint8(found["pictures"]).int() - model.sample(16, mean=True).int()).abs().max() <= 1
    assert found["parameters"].shape == (16, pixels.parameters(1), 8, 8)
    if model.job.model.family == "decoder-only":
        assert "elbo" not in found
        assert not (folder / "encoder.pt2").exists()
        return
    levels, _ = model._levels(found["images"], ids)
    assert torch.equal(found["levels"], levels)
    # The card's first draw is fold 0 of the noise, as all its draws are.
    terms = model.scorer(levels, noise.fold(0).keys)
    torch.testing.assert_close(found["elbo"], -(terms.distortion + terms.rate), rtol=1e-5, atol=1e-4)
    bound = importance_bound(model.scorer.vae, pixels, levels, noise, samples=10).log_likelihood
    torch.testing.assert_close(found["iwae"].double(), bound, rtol=1e-5, atol=1e-4)
    inferred = model.scorer.vae.infer(pixels.to_inputs(levels), noise.fold(0))
    torch.testing.assert_close(found["reconstructions"], pixels.mean(inferred.parameters), rtol=1e-4, atol=1e-4)


def test_card_binarises_as_the_job_does(digits: Path, tmp_path: Path) -> None:
    """Threshold and dynamic are those of other tests; here every image keeps its own thresholds."""
    model = trained("mlp", digits, tmp_path / "bucket", *PIXELS["static"])
    export(model, tmp_path / "out", numbers="")
    lines_of_the_card_agree(model, tmp_path / "out")


@pytest.mark.parametrize(("family", "pixels"), OTHER_PIXELS)
def test_programs_are_the_model_whatever_the_pixels_are(family: str, pixels: str, digits: Path, tmp_path: Path) -> None:
    bits = () if any("likelihood.bits" in setting for setting in PIXELS[pixels]) else ("likelihood.bits=8",)
    binarize = (
        () if any("likelihood.binarize" in setting for setting in PIXELS[pixels]) else ("likelihood.binarize=none",)
    )
    model = trained(family, digits, tmp_path, *bits, *binarize, *PIXELS[pixels])
    made = programs(model, code_shapes(model))
    assert all(program.difference <= 1e-4 for program in made.values()), made


def test_card_states_the_difference_that_was_found(digits: Path, tmp_path: Path) -> None:
    model = trained("conv", digits, tmp_path / "bucket")
    made = programs(model, code_shapes(model))
    export(model, tmp_path / "out", numbers="")
    for name, program in made.items():
        assert f"{program.difference:.1e} ({name})" in (tmp_path / "out/README.md").read_text()


def test_decoder_leaves_the_weights_of_the_encoder_out(digits: Path, tmp_path: Path) -> None:
    export(trained("mlp", digits, tmp_path / "bucket", "model.hidden=[512]"), tmp_path / "out", numbers="")
    sizes = {name: (tmp_path / "out" / name).stat().st_size for name in ("decoder.pt2", "encoder.pt2")}
    assert sizes["encoder.pt2"] > 4 * 512 * 64 * 2  # the pixels' weights, in and out
    assert sizes["decoder.pt2"] < 0.8 * sizes["encoder.pt2"]


def test_weights_that_are_not_finite_are_one_line_and_no_folder(digits: Path, tmp_path: Path) -> None:
    model = trained("mlp", digits, tmp_path / "bucket")
    with torch.no_grad():
        next(model.scorer.vae.parameters())[0] = math.nan
    with pytest.raises(RunError, match=r"encoder.pt2 of .* would differ from its model by nan"):
        export(model, tmp_path / "out", numbers="")
    assert not (tmp_path / "out").exists()


def test_incomplete_or_damaged_export_is_one_line(digits: Path, tmp_path: Path) -> None:
    vaejob.train(job_of("mlp", digits, tmp_path / "bucket", "training.images=128"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vaejob", "export", str(tmp_path / "bucket/run"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket", "out"]
    assert "bits/dim" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="which is there already"):
        export(vaejob.load(str(out)), out, numbers="")
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        vaejob.load(str(out))
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        vaejob.load(str(out))
    (out / "export.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        vaejob.load(str(out))
