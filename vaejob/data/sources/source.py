"""What can be packed: samples in a fixed order, listed cheaply and read one at a time."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Sample(NamedTuple):
    """One image of a source."""

    key: str
    """Its name; the split it falls into is a function of this alone."""
    identity: str
    """Something that changes with its content: a checksum, or size and time."""


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


def printable(name: str) -> str:
    """A file name as a key: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
