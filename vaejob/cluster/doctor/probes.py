"""What one process finds out about itself, its machine, the bucket and the data. No probe leaves a key or a file behind."""

import fcntl
import hashlib
import os
import platform
import secrets
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

from vaejob.cluster.doctor.network import socket_settings
from vaejob.cluster.doctor.results import BucketUse, Conditional, DataSample, Disk, Gpu, Host, Request
from vaejob.config import JobConfig
from vaejob.data.batches import DataSet, open_data
from vaejob.errors import BucketError
from vaejob.storage import OBJECT_STORES, Bucket, open_bucket
from vaejob.storage.bucket import NotOffered
from vaejob.training.ledger import versions

GROUPS_OF_A_WORKER = 8
SAMPLE_BYTES = 64 << 20
IMAGES_OF_A_GROUP = 16
DEADLINE_SECONDS = 20.0
SHARED_MEMORY = Path("/dev/shm")
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of Linux


def now() -> float:
    return time.time()


def look_around(job: JobConfig, *, towards: str = "") -> Host:
    """This process and its machine. towards: the host whose direction decides which interface is meant."""
    shm = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
    address = own_address(towards)
    return Host(
        node=platform.node(),
        versions={**versions(), "code": code_digest()},
        gpu=_gpu(),
        memory=free_memory(),
        shared_memory=shm,
        temporary=_disk(Path(tempfile.gettempdir())),
        cache=_disk(Path(job.data.cache_dir).expanduser(), count=True) if job.data.cache_dir else None,
        address=address,
        interface=interface_of(address),
        settings=socket_settings(),
    )


def code_digest() -> str:
    """The first digits of a hash of the package's own files: two states of one version differ."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def bucket_at(address: str) -> Bucket:
    """One that gives up sooner than a job's, which outlasts what passes."""
    if urlsplit(address).scheme not in OBJECT_STORES:
        return open_bucket(address)
    from vaejob.storage.remote import RemoteBucket

    return RemoteBucket(address, deadline_s=DEADLINE_SECONDS)


def use_bucket_at(address: str, *, left_by_driver: str | None = None) -> BucketUse:
    return use_bucket(bucket_at(address), left_by_driver=left_by_driver)


Timed = Callable[[str], AbstractContextManager[None]]


def use_bucket(bucket: Bucket, *, left_by_driver: str | None = None) -> BucketUse:
    """Puts, gets, lists and deletes a blob, and puts another under a condition; up to the first request that fails."""
    key, data = f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(1024)
    requests: list[Request] = []
    conditional: Conditional = "untried"
    sees: bool | None = None

    @contextmanager
    def timed(verb: str) -> Iterator[None]:
        began, error = time.perf_counter(), ""
        try:
            yield
        except NotOffered:
            raise  # an answer like any other
        except BucketError as failure:
            error = str(failure)
            raise
        finally:
            requests.append(Request(verb, time.perf_counter() - began, error))

    with suppress(BucketError):  # the last request says which
        with timed("put"):
            bucket.write(key, data)
        try:
            with timed("get"):
                _expect(bucket.read(key) == data, f"{bucket.url}/{key} does not read back as it was put")
            with timed("list"):
                _expect(key in bucket.keys(key), f"{bucket.url}/{key} was put there and is in no listing")
            conditional = _put_twice(bucket, f"{key}-once", timed)
            sees = None if left_by_driver is None else bucket.size(left_by_driver) is not None
        finally:
            with timed("delete"):
                bucket.delete(key)
                _expect(bucket.size(key) is None, f"{bucket.url}/{key} is still there after its delete")
    return BucketUse(bucket.url, tuple(requests), conditional, sees)


def _put_twice(bucket: Bucket, key: str, timed: Timed) -> Conditional:
    """Both on the condition that nothing is there, which holds for the first alone."""
    try:
        with timed("conditional put"):
            bucket.create(key, b"first " + secrets.token_bytes(16))
        with timed("second conditional put"):
            return "ignored" if bucket.create(key, b"second " + secrets.token_bytes(16)) else "kept"
    except NotOffered:
        return "not offered"
    finally:
        bucket.delete(key)


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise BucketError(otherwise)


def sample_data(address: str, *, rank: int, world_size: int) -> DataSample:
    """Reads, checks and decodes row groups spread over the data set: other ones on each rank.

    Raises DataError, naming the shard and the row group, for the first that is damaged, and BucketError.
    """
    data = open_data(address)
    sizes, firsts = data.row_groups["size"], np.cumsum(data.row_group_rows) - data.row_group_rows
    chosen = sampled_groups(len(sizes), largest=int(sizes.max()), rank=rank, world_size=world_size)
    began = time.perf_counter()
    for group in chosen:
        rows = min(IMAGES_OF_A_GROUP, int(data.row_group_rows[group]))
        data.images(firsts[group] + np.arange(rows))
    return DataSample(
        address=address,
        images=data.manifest.images,
        shape=data.manifest.shape,
        fingerprint=data.manifest.fingerprint,
        row_groups=len(sizes),
        checked=tuple(chosen),
        read=int(sizes[chosen].sum()),
        seconds=time.perf_counter() - began,
    )


def sampled_groups(row_groups: int, *, largest: int, rank: int, world_size: int) -> list[int]:
    """Numbers of row groups, evenly spread; over all ranks the first and the last are among them."""
    each = max(1, min(GROUPS_OF_A_WORKER, SAMPLE_BYTES // largest))
    spread = np.linspace(0, row_groups - 1, each * world_size).round().astype(int)
    return sorted(set(spread[rank::world_size].tolist()))


def data_bytes(data: DataSet) -> int:
    """Of all images, as they are stored."""
    return int(data.row_groups["size"].sum(dtype=np.int64))


def free_memory() -> int:
    """Bytes that this machine can still give to processes, or its container if that is less."""
    return min(_free_of_machine(), *_free_of_containers())


def _free_of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_containers() -> list[int]:
    """By either version of control groups; file pages that can be dropped count as free."""
    groups = Path("/sys/fs/cgroup")
    found = [1 << 62]
    for limit, used, stat in (
        (groups / "memory.max", groups / "memory.current", groups / "memory.stat"),
        *((groups / "memory" / f"memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),),
    ):
        with suppress(OSError, ValueError):  # no such limit
            counts = dict(line.split() for line in stat.read_text().splitlines())
            found.append(int(limit.read_text()) - int(used.read_text()) + int(counts.get("inactive_file", 0)))
    return found


def _gpu() -> Gpu | None:
    """The first that this process sees."""
    if not torch.cuda.is_available():
        return None
    free, size = torch.cuda.mem_get_info(0)
    return Gpu(torch.cuda.get_device_name(0), free, size)


def _disk(folder: Path, *, count: bool = False) -> Disk:
    """count: also the bytes of the files in the folder. It is made, if need be, as the job would."""
    error = ""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        usage, held = shutil.disk_usage(folder), _bytes_in(folder) if count else 0
        for path in made:
            path.rmdir()
        return Disk(str(folder), usage.free, usage.total, held)
    except OSError as failure:
        error = failure.strerror or type(failure).__name__
    return Disk(str(folder), 0, 0, error=error)


def _bytes_in(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # another has just removed it
                total += (Path(where) / name).stat().st_size
    return total


def own_address(towards: str) -> str:
    """The address of this machine on its way to another, or of its name; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((towards or socket.gethostname(), 9))
        return str(probe.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address; empty where the system does not tell."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                asked = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, asked)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""
