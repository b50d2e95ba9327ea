"""Objects of a bucket or a local folder by obstore, for those loaders that bring no client of their own."""

from pathlib import Path

import obstore.store
from obstore.store import LocalStore, ObjectStore


def open_store(address: str) -> ObjectStore:
    """The store below s3://bucket/prefix, with the endpoint and keys of the environment, or below a local folder."""
    if address.startswith("s3://"):
        return obstore.store.from_url(address, client_options={"allow_http": True})
    return LocalStore(Path(address))


def object_sizes(store: ObjectStore) -> dict[str, int]:
    """Size in bytes of every object, in the order of their names."""
    found = {meta["path"]: meta["size"] for part in store.list() for meta in part}
    return dict(sorted(found.items()))
