"""What no loader on this machine can exceed: bare GETs of our shards, and bare decoding of images in memory."""

from concurrent.futures import ThreadPoolExecutor

from obstore.store import ObjectStore

from tests.benchmarks.peers.loader import BATCH
from tests.benchmarks.peers.objects import object_sizes, open_store
from tests.benchmarks.peers.pictures import Case, to_batch

GET_THREADS = 8
GET_BYTES = 4 << 20
DECODE_THREADS = 2


def fetch(address: str) -> None:
    """Every byte below the address once."""
    store = open_store(address)
    spans = [
        (name, start, min(start + GET_BYTES, size))
        for name, size in object_sizes(store).items()
        for start in range(0, size, GET_BYTES)
    ]
    with ThreadPoolExecutor(GET_THREADS) as threads:
        fetched = sum(threads.map(lambda span: _length(store, *span), spans))
    assert fetched == sum(end - start for _, start, end in spans), fetched


def decode(case: Case, stored: list[bytes]) -> None:
    """Every image once, in batches; raw images are copied."""
    with ThreadPoolExecutor(DECODE_THREADS) as threads:
        firsts = range(0, len(stored), BATCH)
        decoded = sum(threads.map(lambda first: len(to_batch(case, stored[first : first + BATCH])), firsts))
    assert decoded == len(stored), decoded


def _length(store: ObjectStore, name: str, start: int, end: int) -> int:
    return len(store.get_range(name, start=start, end=end))
