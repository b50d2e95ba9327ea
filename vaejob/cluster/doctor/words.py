"""Numbers and names as people read them."""

from collections.abc import Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size_of(count: float) -> str:
    """Bytes in decimal units, to three digits."""
    for unit in _UNITS:
        if count < 999.5 or unit == _UNITS[-1]:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError("unreachable: the last unit takes all")


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes} min"
        if minutes < 120
        else f"{seconds / 3600:.1f} h"
        if seconds < 48 * 3600
        else f"{seconds / 86400:.1f} days"
    )


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def by_size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def who(names: Sequence[str], *, of: int) -> str:
    """Those names, of which there may be a thousand."""
    if len(names) == of > 3:
        return f"all {of}"
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
