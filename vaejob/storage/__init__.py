"""Where bytes live. An address names a place: a folder, memory://name, s3://bucket/prefix, gs://..., az://..."""

from pathlib import Path
from urllib.parse import urlsplit

from vaejob.errors import UserError
from vaejob.storage.bucket import Bucket
from vaejob.storage.directory import DirectoryBucket
from vaejob.storage.memory import MemoryBucket

__all__ = ["Bucket", "absolute", "join", "open_bucket", "split_address"]

OBJECT_STORES = ("s3", "gs", "az")


def open_bucket(address: str) -> Bucket:
    """The bucket at an address; nothing is contacted yet. Raises UserError for an address of no known kind."""
    scheme = urlsplit(address).scheme if "://" in address else ""
    match scheme:
        case "":
            return DirectoryBucket(absolute(address))
        case "file":
            return DirectoryBucket(urlsplit(address).path)
        case "memory":
            return MemoryBucket(address)
        case _ if scheme in OBJECT_STORES:
            from vaejob.storage.remote import RemoteBucket  # its client is loaded only where one is used

            return RemoteBucket(address)
        case _:
            raise UserError(
                f"{address} is no address; use a folder, or one of {', '.join(f'{s}://' for s in OBJECT_STORES)}"
            )


def absolute(address: str) -> str:
    """The address as it reads from any working directory."""
    return address.rstrip("/") if "://" in address else str(Path(address).expanduser().absolute())


def join(address: str, *parts: str) -> str:
    """The address of something below an address."""
    return "/".join([address.rstrip("/"), *(part.strip("/") for part in parts)])


def split_address(address: str) -> tuple[str, str]:
    """An address as (its parent's address, its last part)."""
    parent, _, name = address.rstrip("/").rpartition("/")
    if parent.endswith(":/"):
        raise UserError(f"{address} is a whole bucket; name something in it")
    return parent or ("/" if address.startswith("/") else "."), name
