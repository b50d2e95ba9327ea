"""What the pages of a Parquet column say of themselves, checked before Parquet's reader believes it."""

from typing import Any, NamedTuple

# Thrift numbers of parquet.thrift: PageType, with the field of PageHeader that describes such a page.
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_DESCRIBED_BY = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}


def check_pages(body: bytes, *, values: int, unpacked_bytes: int) -> None:
    """Raises ValueError unless the headers of a chunk's pages add up to what the footer says of the chunk.

    Parquet's reader trusts them: by a damaged one it would ask for gigabytes.
    """
    place, counted, unpacked = 0, 0, 0
    while place < len(body):
        page = _page(body, place)
        if min(page.size, page.unpacked, page.values) < 0 or page.values > values or page.stop > len(body):
            raise ValueError(f"the page at byte {place} of the column says that it has {page.size} bytes")
        counted += page.values if page.kind != _DICTIONARY_PAGE else 0
        unpacked += page.start - place + page.unpacked
        place = page.stop
    if counted != values or unpacked > unpacked_bytes:
        found = f"{counted} values and {unpacked} bytes"
        raise ValueError(f"its pages say that they hold {found}, the footer says {values} and {unpacked_bytes}")


class _Page(NamedTuple):
    """What a page's header says."""

    kind: int
    values: int
    unpacked: int
    """Bytes once they are unpacked."""
    size: int
    """Bytes as they are stored."""
    start: int
    """Where they begin, behind the header."""

    @property
    def stop(self) -> int:
        return self.start + self.size


def _page(body: bytes, place: int) -> _Page:
    try:
        reader = _Header(body, place)
        header = reader.struct()
        kind = header[1]
        return _Page(kind, int(header[_DESCRIBED_BY[kind]][1]), int(header[2]), int(header[3]), reader.place)
    except (LookupError, TypeError) as error:  # a field is not there, or of another type
        raise ValueError(f"the page at byte {place} of the column has a damaged header") from error


class _Header:
    """Reads Thrift's compact protocol from a place in a chunk. Raises ValueError or LookupError for what is none.

    No closures that name themselves: their cycles would keep whole chunks in memory.
    """

    def __init__(self, body: bytes, place: int) -> None:
        self._body = body
        self.place = place

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Fields by their number, up to the byte that ends them."""
        if depth > 3:
            raise ValueError("a page's header is damaged")
        fields, number = dict[int, Any](), 0
        while byte := self._byte():  # the step to the next field's number, and the field's type
            number = number + (byte >> 4) if byte >> 4 else self._signed()
            fields[number] = self._value(byte & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:
                return kind == 1
            case 4 | 5 | 6:
                return self._signed()
            case 8:
                length = self._unsigned()  # reading it moves the place, too
                self.place += length
                return None
            case 12:
                return self.struct(depth + 1)
            case _:
                raise ValueError("a page's header is damaged")

    def _signed(self) -> int:
        number = self._unsigned()
        return (number >> 1) ^ -(number & 1)

    def _unsigned(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("a page's header is damaged")

    def _byte(self) -> int:
        self.place += 1
        return self._body[self.place - 1]
