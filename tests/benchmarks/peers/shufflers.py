"""How the peers order an epoch, written out from their sources with their defaults: (seed, epoch) to row numbers.

A million rows lie in fifty shards, in the order of the data.
"""

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np

ROWS, SHARD_ROWS = 1_000_000, 20_000


def permutation(seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(ROWS)


def unshuffled(seed: int, epoch: int) -> np.ndarray:
    return np.arange(ROWS)


def mosaicml(seed: int, epoch: int, *, nodes: int, twice: bool = False, block: int = 0) -> np.ndarray:
    """py1s; if `twice`, py2s; with a block, py1e: mosaicml-streaming 0.13, streaming/base/shuffle/{py1s,py2s,py1e}.py.

    Shards are laid out by the seed alone and cut into canonical nodes; within each, an epoch shuffles the shards' parts
    and the rows of each part, and py1e then shifts each row by a uniform draw that keeps a part within a block. Canonical
    nodes take turns in a batch (base/partition/orig.py). Defaults for one machine (base/dataset.py): 64 nodes for py1s and
    py2s; for py1e one node and a block of 4,000,000, which falls to 2^18 from 16 machines on.
    """
    fixed, fresh = np.random.default_rng(seed), np.random.default_rng([seed, epoch])
    shards = shuffled_shards(fixed)
    laid = (fixed.permuted(shards, axis=1) if twice else shards).ravel()
    lanes = []
    for start, stop in pairwise(ROWS * node // nodes for node in range(nodes + 1)):
        parts = np.split(laid[start:stop], range(-start % SHARD_ROWS, stop - start, SHARD_ROWS))
        parts = [fresh.permutation(parts[number]) for number in fresh.permutation(len(parts))]
        lanes.append(shifted(parts, block=block, random=fresh) if block else np.concatenate(parts))
    return in_turns(lanes)


def shifted(parts: Sequence[np.ndarray], *, block: int, random: np.random.Generator) -> np.ndarray:
    """py1e's last step."""
    rows, places, first = sum(map(len, parts)), [], 0
    for part in parts:
        reach = max((random.integers(int(0.75 * block), int(1.25 * block)) - len(part)) / 2, 0)
        low, high = max(-reach, -first), min(reach, rows - first - len(part))
        places.append(first + np.arange(len(part)) + random.uniform(low, high, size=len(part)))
        first += len(part)
    return np.concatenate(parts)[np.argsort(np.concatenate(places))]


def litdata(seed: int, epoch: int, *, readers: int, block: int) -> np.ndarray:
    """FullShuffle of litdata 0.2.76, litdata/streaming/shuffle.py.

    Chunks are shuffled and dealt out to the readers end to end; a reader shuffles a chunk's blocks of item_shuffle_window
    rows, 256 unless told otherwise, and the rows of each block. "full", or a version before that setting, shuffles a chunk
    as a whole.
    """
    random = np.random.default_rng([seed, epoch])
    laid = []
    for chunk in shuffled_shards(random):
        blocks = np.split(chunk, range(block, len(chunk), block))
        laid += [random.permutation(blocks[number]) for number in random.permutation(len(blocks))]
    return in_turns(np.split(np.concatenate(laid), readers))


def webdataset(seed: int, epoch: int, *, readers: int) -> np.ndarray:
    """Shards shuffled and dealt out, then .shuffle(1000), which starts with 100: webdataset 1.0, webdataset/filters.py."""
    random = np.random.default_rng([seed, epoch])
    return in_turns([buffered(laid, random) for laid in np.split(shuffled_shards(random).ravel(), readers)])


def buffered(rows: np.ndarray, random: np.random.Generator, *, most: int = 1000, least: int = 100) -> np.ndarray:
    """Each time one goes out two come in, until the buffer is full."""
    coming, held, out = iter(rows.tolist()), list[int](), list[int]()
    draws = iter(random.random(len(rows)).tolist())
    for row in coming:
        held.append(row)
        if len(held) < most:
            held.extend(islice(coming, 1))
        if len(held) >= least:
            out.append(pick(held, next(draws)))
    return np.array(out + [pick(held, draw) for draw in draws])


def pick(held: list[int], draw: float) -> int:
    number = int(draw * len(held))
    held[number], held[-1] = held[-1], held[number]
    return held.pop()


def huggingface(seed: int, epoch: int, *, inputs: int, most: int = 1000) -> np.ndarray:
    """IterableDataset.shuffle() of Parquet in datasets 5.2, datasets/iterable_dataset.py.

    Shards are shuffled and dealt out to max_buffer_input_shards inputs, ten unless told otherwise, which take turns with
    tables that are the buffer's size over their number; a full buffer is shuffled, and keeps half its size. Before version
    5 there was one input, and rows left the full buffer one by one.
    """
    random = np.random.default_rng([seed, epoch])
    turns = shuffled_shards(random).reshape(inputs, -1, most // inputs).transpose(1, 0, 2)
    held, out = np.empty(0, dtype=np.int64), []
    for table in turns.reshape(-1, most // inputs):
        held = np.concatenate([held, table])
        if len(held) >= most:
            leaving, held = np.split(random.permutation(held), [len(held) - most // 2])
            out.append(leaving)
    return np.concatenate([*out, random.permutation(held)])


def shuffled_shards(random: np.random.Generator) -> np.ndarray:
    """Row numbers by shard; shape [shards, rows of a shard]."""
    return random.permutation(np.arange(ROWS).reshape(-1, SHARD_ROWS), axis=0)


def in_turns(lanes: Sequence[np.ndarray]) -> np.ndarray:
    """One row of each, over and over."""
    return np.stack(lanes, axis=1).ravel()
