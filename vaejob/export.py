"""A trained model as a folder of its own: weights, configuration, identity, programs of plain torch, and a card that says
what its numbers are of.

Shapes: B images, C H W channels and pixels, P pixel parameters over all channels, N numbers of all layers of an image's code.
"""

import copy
import hashlib
import io
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from vaejob.errors import RunError, UserError
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.loaded import EXPORT_FILES, EXPORT_FORMAT, EXPORT_MARKER, LoadedModel
from vaejob.model.noise import Noise
from vaejob.version import VERSION

ROUNDING = 1e-4
"""How far a program may be from the model that it was made of, relative to the largest number of an output."""


class Program(NamedTuple):
    """One torch.export program, and how far it was from the model at most, over all numbers of all outputs."""

    data: bytes
    difference: float
    relative: float  # to the largest number of an output, or to 1 where that is less


def export(model: LoadedModel, folder: Path, *, numbers: str) -> dict[str, Any]:
    """Writes the folder whole or not at all; what its export.json says. numbers: the card's lines on the likelihood.

    Raises UserError for a folder that is there and not empty, or cannot be written; RunError for a model that its programs do
    not agree with.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out is {folder}, which is there already; name a new or an empty folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            about = _write(model, beside, numbers=numbers)
            beside.chmod(0o755)
            beside.rename(folder)  # takes the place of an empty folder
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out is {folder}, which cannot be written: {error.strerror}") from None
    return about


def _write(model: LoadedModel, folder: Path, *, numbers: str) -> dict[str, Any]:
    tensors = {f"model.{name}": value.contiguous().cpu() for name, value in model.scorer.state_dict().items()}
    shapes = code_shapes(model)
    made = programs(model, shapes)
    contents = {
        "model.safetensors": save(tensors),
        "job.yaml": model.job.to_yaml().encode(),
        **{name: program.data for name, program in made.items()},
        "README.md": _card(model, made, shapes, numbers=numbers).encode(),
    }
    about = {
        "format": EXPORT_FORMAT,
        "run": model.address,
        "checkpoint": model.record.images_seen,
        "weights": sum(parameter.numel() for parameter in model.scorer.parameters()),
        "versions": {"vaejob": VERSION, "torch": torch.__version__},
        "sha256": {name: hashlib.sha256(contents[name]).hexdigest() for name in (*EXPORT_FILES, *made)},
        "record": model.record.model_dump(mode="json"),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / EXPORT_MARKER).write_text(json.dumps(about, indent=1))
    return about


class Decoder(nn.Module):
    """A code, told in standard deviations of its prior, so that N(0, 1) samples, to the mean picture and pixel parameters."""

    def __init__(self, scorer: NegativeELBO) -> None:
        super().__init__()
        self.vae, self.pixels = scorer.vae, scorer.pixels

    def given(self, numbers: Float[Tensor, "B N"]) -> Noise:
        """Numbers that the caller drew, those of each layer after those of the one above it."""
        streams = self.vae.streams
        parts = torch.split(numbers, [math.prod(shape) for _, shape in streams], dim=1)
        drawn = {stream: part.reshape(-1, *shape) for (stream, shape), part in zip(streams, parts, strict=True)}
        return Noise(numbers, drawn)  # the keys are asked for nothing

    def forward(self, code: Float[Tensor, "B N"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B P H W"]]:
        parameters = self.vae.generate(self.given(code))
        return self.pixels.mean(parameters), parameters


class Encoder(Decoder):
    """Levels and N(0, 1) noise to a code drawn from the posterior, which Decoder reads, and the nats of that draw."""

    def forward(self, levels: Tensor, noise: Float[Tensor, "B N"]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """code, -log p(x | z), the rate that the ELBO counts, and log q(z | x) / p(z), which the IWAE bound counts."""
        layers, parameters = self.vae.infer(self.pixels.to_inputs(levels), self.given(noise))
        code = [((layer.z - layer.prior.mean) * (-layer.prior.log_std).exp()).flatten(1) for layer in layers]
        rates = [layer.rate() for layer in layers]
        ratios = [layer.posterior.log_prob(layer.z) - layer.prior.log_prob(layer.z) for layer in layers]
        distortion = -self.pixels.log_prob(parameters, levels)
        return torch.cat(code, 1), distortion, torch.stack(rates, 1).sum(1), torch.stack(ratios, 1).sum(1)


def code_shapes(model: LoadedModel) -> list[tuple[int, ...]]:
    """Of the code of one image, layer by layer, from the top down."""
    return [shape for _, shape in model.scorer.vae.streams]


def programs(model: LoadedModel, shapes: list[tuple[int, ...]]) -> dict[str, Program]:
    """decoder.pt2, and encoder.pt2 where the family has an encoder, for the CPU and any number of images.

    Raises RunError for one that differs from the model by more than rounding, or where the model is not finite.
    """
    scorer = model.scorer if model.device.type == "cpu" else copy.deepcopy(model.scorer).cpu()
    generator, numbers = torch.Generator().manual_seed(0), sum(map(math.prod, shapes))
    noise = torch.randn(5, numbers, generator=generator)
    levels = torch.randint(scorer.pixels.levels, (5, *model.record.shape), dtype=torch.uint8, generator=generator)
    wanted: dict[str, tuple[Decoder, tuple[Tensor, ...]]] = {"decoder.pt2": (Decoder(scorer), (noise,))}
    if model.job.model.family != "decoder-only":
        wanted["encoder.pt2"] = (Encoder(scorer), (levels, noise))
    made = {}
    for name, (module, arguments) in wanted.items():
        made[name] = _traced(module.eval(), arguments)
        if not made[name].relative <= ROUNDING:  # also where it is nan
            raise RunError(
                f"{name} of {model.address} would differ from its model by {made[name].relative:.1e} of its largest number; "
                f"rounding explains at most {ROUNDING:.0e}; choose a --checkpoint whose weights are finite"
            )
    return made


@torch.no_grad()
def _traced(module: nn.Module, arguments: tuple[Tensor, ...]) -> Program:
    """The program as it is read back, compared with the module for as many images as there are and for one."""
    batch = torch.export.Dim("images")
    example = tuple(argument[:3] for argument in arguments)
    program = torch.export.export(module, example, dynamic_shapes=({0: batch},) * len(example), strict=False)
    names = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and not node.users:
            program.state_dict[names[node.name]] = nn.Parameter(torch.empty(0))  # such as the encoder's of a decoder
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    read_back, differences = torch.export.load(buffer).module(), []
    for images in (1, len(arguments[0])):
        some = tuple(argument[:images] for argument in arguments)
        for found, expected in zip(read_back(*some), module(*some), strict=True):
            apart = (found - expected).abs().max()
            differences.append(torch.stack((apart, apart / expected.abs().max().clamp(min=1.0))))
    return Program(buffer.getvalue(), *torch.stack(differences).amax(0).tolist())  # amax keeps nan


def _card(model: LoadedModel, made: dict[str, Program], shapes: list[tuple[int, ...]], *, numbers: str) -> str:
    shape = "x".join(map(str, model.record.shape))
    return f"""# {model.job.run.name}

A variational autoencoder ({model.job.model.family}) of {shape} images, exported by vaejob {VERSION} from the checkpoint of
{model.record.images_seen:,} images of {model.address}.

## Likelihood

{numbers}

Training data: {model.job.data.train} (fingerprint {model.record.train_fingerprint})

## Use

```python
import vaejob

model = vaejob.load(".")  # this folder; needs neither Ray nor the run's bucket
pictures = model.sample(16)
```

model.safetensors holds the weights under model.NAME, averaged ones where the job has them. They are plain safetensors.

## Use without vaejob

With torch {torch.__version__.split("+")[0]} or later and safetensors, in this folder:

```python
{_plain_lines(model, sum(map(math.prod, shapes)))}
```

{_what_programs_are(model, made, shapes)}
"""


def _plain_lines(model: LoadedModel, numbers: int) -> str:
    """What needs nothing but torch and safetensors; tests run it."""
    match model.job.likelihood:
        case likelihood if likelihood.pixels != "bernoulli":
            levels = f"images >> {8 - likelihood.bits}  # the {likelihood.bits} highest bits of 8"
        case likelihood if likelihood.binarize in ("static", "dynamic"):
            levels = "(torch.rand(images.shape) < images / 255).byte()  # binarised at random"
        case _:
            levels = "(images >= 128).byte()  # binarised"
    lines = f"""
import math, torch
from safetensors.torch import load_file

weights = load_file("model.safetensors")  # by name, for a network of your own
decoder = torch.export.load("decoder.pt2").module()
pictures, parameters = decoder(torch.randn(16, {numbers}))  # codes from the prior to mean pixels in [0, 1]
""".strip()
    if model.job.model.family == "decoder-only":
        return lines.replace("import math, torch", "import torch")
    return f"""{lines}

encoder = torch.export.load("encoder.pt2").module()
images = (255 * pictures).round().byte()  # or your own: uint8, {", ".join(["B", *map(str, model.record.shape)])}
levels = {levels}
draws = [encoder(levels, torch.randn(len(levels), {numbers})) for _ in range(10)]
code, distortion, rate, ratio = draws[0]
reconstructions, _ = decoder(code)
elbo = -(distortion + rate)  # at most log p(levels), in nats, of each image
iwae = torch.stack([-(d + r) for _, d, _, r in draws]).logsumexp(0) - math.log(len(draws))  # a tighter bound"""


def _what_programs_are(model: LoadedModel, made: dict[str, Program], shapes: list[tuple[int, ...]]) -> str:
    differences = ", ".join(f"{program.difference:.1e} ({name})" for name, program in made.items())
    layers = "one layer" if len(shapes) == 1 else f"{len(shapes)} layers, from the top down,"
    lines = [
        f"{' and '.join(made)}: torch.export programs for the CPU, in float32, for any number of images. Read back and run\n"
        f"when they were written, their numbers differed from the model's by at most {differences}.",
        f"A code is the {sum(map(math.prod, shapes)):,} numbers of {layers} of "
        f"{', '.join('x'.join(map(str, shape)) for shape in shapes)}. Each tells\n"
        "how many standard deviations z is from the mean of its prior, given the layers above: so N(0, 1) samples,\n"
        f"and what the encoder gives the decoder reads. parameters are those of the {model.job.likelihood.pixels} pixels.",
    ]
    if model.job.model.family != "decoder-only":
        lines.append(
            "The encoder gives, for one draw from the posterior by the noise: the code, -log p(x | z), the rate of the ELBO\n"
            "(in closed form where there is one) and log q(z | x) / p(z) of the draw, all in nats of each image."
        )
    else:
        lines.append("There is no encoder.pt2: this family has no encoder, and no code follows from an image.")
        if "vae.table" in dict(model.scorer.named_parameters()):
            lines.append("The codes learnt for the training images are the rows of model.vae.table, by their ids.")
    return "\n\n".join(lines)
