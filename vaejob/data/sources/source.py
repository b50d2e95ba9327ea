"""What can be packed: samples in a fixed order, listed cheaply and read one at a time."""

from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

MOST_IMAGE_BYTES = 1_000_000_000
"""Beyond which a member of an archive is refused before it is read."""


class Sample(NamedTuple):
    """One image of a source."""

    key: str
    """Its name; the split it falls into is a function of this alone."""
    identity: str
    """Something that changes with its content: a checksum, or the place in a file and the file's version."""


@runtime_checkable
class ImageSource(Protocol):
    """Images with names. Reading is safe from several threads."""

    @property
    def description(self) -> str:
        """What this is, for people; it is kept in the manifest."""
        ...

    @property
    def samples(self) -> list[Sample]:
        """Every image, in the order in which it will be packed."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The image of samples[index]: an image file, or uint8 pixels [C, H, W]. Raises DataError naming its key."""
        ...


class Reopened:
    """A dataclass that crosses processes as its fields; what it has worked out or opened stays behind."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def printable(name: str) -> str:
    """A file name as a key: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
