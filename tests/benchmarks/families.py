"""What a ladder of codes buys on one core: conv and hierarchical, trained on the same images for equal CPU time.

    python tests/benchmarks/families.py [--data FOLDER] [--seconds 300] [--slice 15] [--conv KEY=VALUE ...]
                                        [--hierarchical KEY=VALUE ...]

FOLDER holds packed 28x28 images in train/ and test/, as `vaejob pack` writes them. Each family has one process with one
thread; they take turns, and the clock of a turn is that process's CPU time, with the reading of images in it. Both start
at the pixels' mean, see the same batches in the same order, and keep their learning rate. Figures are the held-out -ELBO in
nats, each image binarised alike for both, so that the difference has an error of its own.
"""

import argparse
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from sys import path

import numpy as np
import torch

path.insert(0, str(Path(__file__).parents[2]))

import vaejob
from tests.benchmarks.loop import all_images, pack_digits
from tests.benchmarks.stepping import take_step
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.likelihood.bounds import NegativeELBO
from vaejob.training.step import draw_levels, evaluation_noise, make_optimizer, make_scorer

# A small batch: minutes on one core are few steps.
COMMON = ["data.global_batch=32", "optimizer.clip=200"]
FAMILIES = {
    "conv": ["model.family=conv", "optimizer.learning_rate=3e-3"],
    "hierarchical": [
        "model.family=hierarchical",
        "model.layers=1x1,4x2,7x2,14x2,28x1",
        "model.width=32",
        "model.latent_channels=4",
        "optimizer.name=adamax",
        "optimizer.learning_rate=1e-2",
    ],
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", help="default: scikit-learn's digits, enlarged to 28x28")
    arguments.add_argument("--seconds", type=float, default=300.0, help="CPU seconds of training for each family")
    arguments.add_argument("--slice", type=float, default=15.0, help="CPU seconds of one turn")
    for family in FAMILIES:
        arguments.add_argument(f"--{family}", nargs="*", default=[], metavar="KEY=VALUE", help="other settings")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or pack_split_digits(folder)
        settings = {name: [*own, *getattr(options, name)] for name, own in FAMILIES.items()}
        found = race(settings, data, seconds=options.seconds, turn=options.slice)
    for name, nats in found.items():
        print(f"{name}: held-out -ELBO {nats.mean():.2f} +- {standard_error(nats):.2f} nats")
    ahead = found["conv"] - found["hierarchical"]
    print(f"hierarchical is ahead by {ahead.mean():.2f} +- {standard_error(ahead):.2f} nats over {len(ahead):,} images")


def race(settings: dict[str, list[str]], data: str, *, seconds: float, turn: float) -> dict[str, np.ndarray]:
    """Held-out nats of each image, by family."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, own in settings.items():
        pipes[name], far_end = context.Pipe()
        context.Process(target=one_family, args=(far_end, own, data), daemon=True).start()
        print(f"{name}: {pipes[name].recv():,} weights, {', '.join(own)}")
    spent = 0.0
    while spent < seconds:
        spent += (now := min(turn, seconds - spent))
        for name, pipe in pipes.items():
            pipe.send(now)
            images, nats = pipe.recv()
            print(f"{spent:6.0f} CPU s  {name:12}  {images:9,} images  training -ELBO {nats:7.2f}", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    return {name: pipe.recv() for name, pipe in pipes.items()}


def one_family(pipe: Connection, settings: list[str], data: str) -> None:
    """Trains for as many CPU seconds as each message grants, until one is None; then scores."""
    torch.set_num_threads(1)
    overrides = [f"data.train={data}/train", f"data.test={data}/test", *COMMON, *settings]
    job = vaejob.load_config("mnist-iwae-1", *overrides)
    train = vaejob.open_data(job.data.train)
    scorer = make_scorer(job, shape=(1, 28, 28))
    mean = torch.from_numpy(all_images(job.data.train)).float().mean(0) / 255
    scorer.vae.set_output_bias(scorer.pixels.initial_parameters(mean))
    optimizer = make_optimizer(job.optimizer, scorer)
    batches = train.training_batches(job.data, seed=0, images_seen=0, until=1 << 40)
    pipe.send(sum(weight.numel() for weight in scorer.parameters()))
    images = 0
    for seconds in iter(pipe.recv, None):
        began, before, nats = time.process_time(), images, 0.0
        while time.process_time() - began < seconds:
            batch = next(batches)
            terms = take_step(job, scorer, optimizer, batch)
            images += len(batch.ids)
            nats += terms.objective_nats.item()
        pipe.send((images, nats / (images - before)))
    pipe.send(held_out(job, scorer))


@torch.no_grad()
def held_out(job: vaejob.JobConfig, scorer: NegativeELBO) -> np.ndarray:
    """The negative ELBO of each held-out image."""
    assert job.data.test
    nats = []
    for ids, images in vaejob.open_data(job.data.test).evaluation_blocks():
        noise = evaluation_noise(ids, device=torch.device("cpu"))
        levels = draw_levels(torch.from_numpy(images), ids, pixels=scorer.pixels, config=job.likelihood, noise=noise)
        terms = scorer(levels, noise.keys)
        nats.append((terms.distortion + terms.rate).double().numpy())
    return np.concatenate(nats)


def pack_split_digits(folder: str) -> str:
    """A fifth of the digits is held out."""
    images = all_images(pack_digits(f"{folder}/all", images=1797))
    pack(ArraySource("digits at 28x28", images), folder, split="train=0.8,test=0.2")
    return folder


def standard_error(values: np.ndarray) -> float:
    return float(values.std() / np.sqrt(len(values)))


if __name__ == "__main__":
    main()
