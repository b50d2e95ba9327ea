"""Noise belongs to images: brute force in Python integers, independence of the batch, the right distributions."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vaejob.model.noise import BINARIZE, LATENT, PIXELS, Noise, image_noise

GAMMA, FOLD = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
IDS = st.integers(0, 2**62)
GOLDEN = {
    "keys": [8581421693456555671, 8536574981256961074],
    "uniform": [[9316167, 1006744, 910474], [13234437, 11090982, 584466]],
    "normal": [
        [0.82398521900177, 0.8270393013954163, -0.611809253692627],
        [1.8007841110229492, 1.399490475654602, -0.43528738617897034],
    ],
    "fold": [-854289744773879677, -1302757504889840504],
}


def mix(state: int) -> int:
    state %= 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def key_of(image_id: int, *, seed: int, purpose: str, epoch: int) -> int:
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return mix(int.from_bytes(digest[:8], "little") + image_id * GAMMA)


def hash_of(key: int, *, stream: int, index: int) -> int:
    return mix(mix(key + (stream + 1) * GAMMA) + (index + 1) * GAMMA)


def noise(ids, **settings) -> Noise:
    return image_noise(np.asarray(ids), **{"seed": 0, "purpose": "train", "device": "cpu"} | settings)


def test_python_integers_give_the_same_uniforms():
    ids = [0, 7, 10**12]
    drawn = noise(ids, seed=3, purpose="static", epoch=5).fold(11).uniform(PIXELS, (2, 3))
    assert drawn.dtype == torch.float32
    for row, image_id in zip(drawn.flatten(1).tolist(), ids, strict=True):
        key = mix((key_of(image_id, seed=3, purpose="static", epoch=5) ^ FOLD) + 11 * GAMMA)
        hashes = [hash_of(key, stream=PIXELS, index=e // 2) >> 32 * (e % 2) for e in range(6)]
        assert row == [(h & 0xFFFFFF) / 2**24 for h in hashes]


def test_python_integers_give_the_same_normals():
    drawn = noise([42]).normal(LATENT, (5,))[0].tolist()
    key, expected = key_of(42, seed=0, purpose="train", epoch=0), []
    for index in range(3):
        h = hash_of(key, stream=LATENT, index=index)
        radius = math.sqrt(-2 * math.log(((h & 0xFFFFFFFF) + 1) / 2**32))
        angle = 2 * math.pi * (h >> 32) / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    assert drawn == [float(np.float32(x)) for x in expected[:5]]


def test_pinned_values_never_change():
    """A stream that changed would change every published number; new streams are welcome, old ones stay."""
    one = noise([0, 1], seed=0, purpose="train", epoch=0)
    assert one.keys.tolist() == GOLDEN["keys"]
    assert (one.uniform(BINARIZE, (3,)) * 2**24).long().tolist() == GOLDEN["uniform"]
    torch.testing.assert_close(one.normal(LATENT, (3,)), torch.tensor(GOLDEN["normal"]), rtol=1e-6, atol=0)
    assert one.fold(1).keys.tolist() == GOLDEN["fold"]


@settings(max_examples=50, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=9), st.data(), st.integers(1, 40), st.integers(0, 40))
def test_noise_does_not_depend_on_the_batch(ids, data, size, stream):
    order = data.draw(st.permutations(range(len(ids))))
    together, shuffled = noise(ids), noise([ids[i] for i in order])
    for draw in (Noise.uniform, Noise.normal):
        whole = draw(together, stream, (size,))
        assert torch.equal(draw(shuffled, stream, (size,)), whole[list(order)])
        assert torch.equal(torch.cat([draw(noise([i]), stream, (size,)) for i in ids]), whole)
        # An element depends on its index alone, not on how many are asked for.
        assert torch.equal(draw(together, stream, (size + 3,))[:, :size], whole)


def test_large_batches_draw_what_single_images_draw():
    """Crosses the sizes at which torch starts to use several threads and vector instructions."""
    ids = np.arange(700)
    whole = noise(ids).normal(LATENT, (101,))
    assert torch.equal(whole[[3, 333, 699]], noise([3, 333, 699]).normal(LATENT, (101,)))


GRAPHS = """
import torch
from vaejob.model.noise import LATENT, Noise

def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)

some = Noise(torch.arange(-3, 8) * 0x1234567890ABCDE).fold(3)
try:
    compiled(lambda keys: Noise(keys).normal(LATENT, (7,)))(some.keys)
except Exception as error:
    assert "drawn beforehand" in str(error), error
else:
    raise SystemExit("drawn in a graph")
drawn = some.draw([(LATENT, (7,))]).drawn
found = compiled(lambda keys, drawn: Noise(keys, drawn).normal(LATENT, (7,)) * 2)(some.keys, drawn)
assert torch.equal(found, some.normal(LATENT, (7,)) * 2)
"""


def test_compiled_graph_refuses_to_draw_and_takes_what_was_drawn():
    """torch's compiler would draw wrong numbers in the last vector of a row, and say nothing; without checks of shapes."""
    done = subprocess.run([sys.executable, "-c", GRAPHS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_folds_are_laid_end_to_end():
    one = noise([1, 2, 3])
    assert torch.equal(one.folds(range(4, 7)).keys, torch.cat([one.fold(k).keys for k in (4, 5, 6)]))


def test_ids_may_be_an_array_that_cannot_be_written_or_a_tensor():
    ids = np.arange(4)
    ids.flags.writeable = False
    assert torch.equal(noise(ids).keys, image_noise(torch.arange(4), seed=0, purpose="train", device="cpu").keys)


def test_no_images_draw_nothing():
    none = noise(np.empty(0, dtype=np.int64))
    assert none.uniform(BINARIZE, (1, 28, 28)).shape == (0, 1, 28, 28)
    assert none.fold(2).normal(LATENT, (5,)).shape == (0, 5)


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 1, 1), (2, 0), (3,)])
@pytest.mark.parametrize("draw", [Noise.uniform, Noise.normal])
def test_every_shape_can_be_drawn(draw, shape, images):
    some = noise(np.arange(images, dtype=np.int64))
    drawn = draw(some, LATENT, shape)
    assert drawn.shape == (images, *shape)
    if math.prod(shape) == 1:
        assert torch.equal(drawn.flatten(), draw(some, LATENT, (7,))[:, 0])


@pytest.mark.parametrize("device_shape", [(400, 501), (4, 50_100), (100_100, 2)])
def test_distributions_are_uniform_and_normal(device_shape):
    images, size = device_shape
    uniform = noise(np.arange(images)).uniform(BINARIZE, (size,)).numpy().ravel()
    normal = noise(np.arange(images)).normal(LATENT, (size,)).double().numpy().ravel()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    error = 1 / math.sqrt(len(normal))
    for power, moment, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((normal**power).mean() - moment) < 4 * spread * error


def test_neighbours_are_not_correlated():
    ids = np.arange(100)
    base, size = noise(ids), (1000,)
    neighbours = {
        "id": noise(ids + 1).normal(LATENT, size),
        "seed": noise(ids, seed=1).normal(LATENT, size),
        "epoch": noise(ids, epoch=1).normal(LATENT, size),
        "purpose": noise(ids, purpose="evaluate").normal(LATENT, size),
        "stream": base.normal(LATENT + 1, size),
        "fold": base.fold(0).normal(LATENT, size),
        "next fold": base.fold(1).normal(LATENT, size),
        "fold against stream": base.fold(LATENT + 1).normal(0, size),
        "element": base.normal(LATENT, (1001,))[:, 1:],
        "other half of the pair": base.normal(LATENT, (1002,))[:, 2:],
    }
    drawn = [base.normal(LATENT, size), *neighbours.values()]
    flat = torch.stack([d.flatten() for d in drawn]).double()
    # Of the values and of their squares, between all pairs; 1e5 numbers each, so 0.016 is five standard errors.
    for values in (flat, flat.square()):
        correlation = torch.corrcoef(values)
        assert (correlation - torch.eye(len(drawn))).abs().max() < 0.016


def test_keys_do_not_collide():
    epochs = [noise(np.arange(10_000), epoch=epoch) for epoch in range(5)]
    keys = torch.cat([each.keys for each in epochs] + [each.fold(1).keys for each in epochs])
    assert len(keys.unique()) == len(keys)


def test_every_bit_of_a_uniform_is_fair():
    digits = (noise(np.arange(200)).uniform(BINARIZE, (784,)) * 2**24).long().flatten()
    ones = torch.stack([(digits >> bit & 1).double().mean() for bit in range(24)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(digits))
