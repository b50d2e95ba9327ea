"""Which split a sample falls into, as a pure function of its key."""

import hashlib
import re
from collections.abc import Sequence
from fractions import Fraction

from vaejob.errors import DataError


def parse_split(text: str) -> dict[str, Fraction]:
    """Names and fractions of 'train' or 'train=0.9,test=0.1'."""
    fractions: dict[str, Fraction] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name) or name in fractions:
            raise DataError(
                f"--split is {text}; it must be one name, or names with fractions such as train=0.9,test=0.1"
            )
        if not re.fullmatch(r"\d*\.?\d+", number if equals else "1"):
            raise DataError(f"--split gives {name} {number!r}; it must be a fraction such as 0.1")
        fractions[name] = Fraction(number) if equals else Fraction(1)
    if sum(fractions.values()) != 1:
        raise DataError(
            f"--split is {text}; its fractions sum to {float(sum(fractions.values())):g}, they must sum to 1"
        )
    return fractions


def divide(keys: Sequence[str], fractions: dict[str, Fraction]) -> dict[str, list[int]]:
    """The indices of each split's keys, in order; a key's split does not depend on the other keys."""
    chosen: dict[str, list[int]] = {name: [] for name in fractions}
    for index, key in enumerate(keys):
        chosen[split_of(key, fractions)].append(index)
    return chosen


def split_of(key: str, fractions: dict[str, Fraction]) -> str:
    """The split whose share of [0, 1) holds the key's hash."""
    place = Fraction(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"), 2**64)
    for name, fraction in fractions.items():
        if place < fraction:
            return name
        place -= fraction
    raise AssertionError(fractions)
