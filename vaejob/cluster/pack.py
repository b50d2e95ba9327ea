"""Packing on Ray Data, from bucket to bucket: tasks write the shards, the driver gathers what each of them is.

shard numbers --Ray Data--> tasks --shards--> bucket
                              `--descriptions--> driver
"""

import logging
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from importlib.metadata import version
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.data
import ray.exceptions
from ray.data.exceptions import ExecutionTimeoutError

from vaejob.cluster.join import cluster_of, first_line, wait_for_room
from vaejob.config import ClusterConfig
from vaejob.data.pack import Packer
from vaejob.data.part import Packed, Part, pack_shard
from vaejob.errors import ClusterError, DataError, VaejobError
from vaejob.storage import OBJECT_STORES, join

MOST_TASKS = 10_000
"""Of a part with more shards, each task packs several: starting one costs the driver some 10 ms and 4 kB."""

# What a task was seen to need.
_ROOM_BYTES = 256 << 20
_COPIES = 8  # of the shard: its rows, their columns, the file, the file sealed, ...
_LISTED_BYTES = 600  # of each image of the source: its name and its place


@contextmanager
def cluster_packer(
    config: ClusterConfig,
    *,
    at_once: int | None = None,
    addresses: Sequence[str] = (),
    on_note: Callable[[str], None] = lambda text: None,
) -> Iterator[Packer]:
    """A packer for `pack`, which joins the cluster when it is first used and leaves it in the end.

    It packs `at_once` shards at the same time; without a number, as many as the cluster has room for. Of those of the
    addresses that are local it is noted if the cluster has several machines.
    """
    with ExitStack() as joined:

        def packer(part: Part, *, on_images: Callable[[int], None]) -> Iterator[Packed]:
            if not ray.is_initialized():
                joined.enter_context(cluster_of(config))
                wait_for_room(config.model_copy(update={"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0}))
                if (machines := len(_nodes())) > 1:
                    for address in filter(_is_local, addresses):
                        on_note(f"{address} must be shared by all {machines} machines of the cluster")
            return _gathered(part, _shards(part, at_once=at_once), on_images=on_images)

        yield packer


def _shards(part: Part, *, at_once: int | None) -> ray.data.Dataset:
    """What becomes of each shard of a part, once it is asked for, in any order."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    tasks = min(part.num_shards, MOST_TASKS)
    numbers = [{"number": number} for number in range(part.num_shards)]
    return ray.data.from_items(numbers, override_num_blocks=tasks).map(
        partial(_pack_one, part=ray.put(part), versions=_versions()),
        num_cpus=1,
        memory=_task_bytes(part),
        concurrency=None if at_once is None else min(at_once, tasks),
    )


def _versions() -> dict[str, str]:
    """Of what decides the bytes of a shard."""
    return {name: version(name) for name in ("vaejob", "pyarrow", "pillow", "simplejpeg", "pyspng")}


def _pack_one(row: dict[str, Any], *, part: "ray.ObjectRef[Part]", versions: dict[str, str]) -> dict[str, Any]:
    found: Packed | VaejobError
    try:
        if (here := _versions()) != versions:
            raise ClusterError(f"a machine of the cluster has {here}, this one {versions}; they must be the same")
        found = pack_shard(_fetched(part), row["number"])
    except VaejobError as error:
        found = error  # raised here, Ray Data would wrap it in errors and logs of its own
    return {"number": row["number"], "found": pickle.dumps(found)}


@lru_cache(maxsize=1)
def _fetched(part: "ray.ObjectRef[Part]") -> Part:
    """Once by each process, which packs many shards."""
    return ray.get(part)


def _gathered(part: Part, shards: ray.data.Dataset, *, on_images: Callable[[int], None]) -> Iterator[Packed]:
    """The shards in order, once the last is there. Raises what was wrong with an image or a bucket."""
    packed = dict[int, Packed]()
    try:
        for row in _until_interrupted(shards.iter_rows()):
            found: Packed | VaejobError = pickle.loads(row["found"])
            if isinstance(found, VaejobError):
                raise found
            _refuse_elsewhere(part, found)
            packed[row["number"]] = found
            on_images(found.shard.rows)
    except (ray.exceptions.RayTaskError, ray.exceptions.UserCodeException):
        raise  # our fault
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise ClusterError(f"packing on the cluster ended: {first_line(error)}; repeat the command to go on") from error
    yield from (packed[number] for number in range(part.num_shards))


def _until_interrupted(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, until ctrl-C: an interrupt that comes while a finaliser of Ray's runs is lost, so it is remembered here."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as of a job that a shell put into the background
    if ignored or threading.current_thread() is not threading.main_thread():
        yield from rows
        return
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for row in rows:
            if interrupted:
                raise KeyboardInterrupt
            yield row
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def _refuse_elsewhere(part: Part, packed: Packed) -> None:
    """Raises DataError if a shard went into another machine's folder of the same name."""
    if _is_local(part.address) and part.bucket.size(packed.shard.key) != packed.shard.size:
        address = join(part.address, packed.shard.key)
        raise DataError(f"{address} was written on another machine; DEST must be a bucket, or a folder that all share")


def _task_bytes(part: Part) -> int:
    """Memory that a task asks for. Raises ClusterError if no machine has it: Ray would wait for ever."""
    asked = _ROOM_BYTES + _COPIES * part.shard_bytes + _LISTED_BYTES * len(part.source.samples)
    most = max(node["Resources"].get("memory", 0) for node in _nodes())
    if asked > most:
        raise ClusterError(
            f"--shard-bytes: a shard of {part.shard_bytes >> 20} MiB takes {asked >> 20} MiB of memory to pack, the "
            f"largest node of the cluster offers {int(most) >> 20} MiB; make them smaller"
        )
    return asked


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _is_local(address: str) -> bool:
    return urlsplit(address).scheme not in OBJECT_STORES
