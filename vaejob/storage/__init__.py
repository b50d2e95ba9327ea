"""Where bytes live. An address names a place: a folder, memory://name, s3://bucket/prefix, gs://..., az://..."""

from pathlib import Path
from urllib.parse import urlsplit

from vaejob.errors import UserError
from vaejob.storage.bucket import Bucket
from vaejob.storage.directory import DirectoryBucket
from vaejob.storage.memory import MemoryBucket
from vaejob.storage.secrets import refuse_credentials

__all__ = ["Bucket", "absolute", "join", "open_bucket", "split_address"]

OBJECT_STORES = ("s3", "gs", "az")


def open_bucket(address: str) -> Bucket:
    """The bucket at an address; nothing is contacted yet. UserError if it is of no known kind, or carries credentials."""
    refuse_credentials(address)
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
    """The address as it reads from any working directory. UserError if it carries credentials: it will be written down."""
    refuse_credentials(address)
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
