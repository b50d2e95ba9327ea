"""HTML in which no text of a bucket becomes markup: a plain string is escaped wherever it enters."""

import base64
import html
import re
from collections.abc import Iterable, Sequence

VOID = ("img", "meta")


class Html(str):
    """Markup, and therefore not escaped."""

    __slots__ = ()


def tag(element: str, /, *children: str, **attributes: str | float | bool | None) -> Html:
    """An element; of attributes class_ is class, aria_label aria-label, True one without a value, None and False none."""
    said = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    return Html(f"<{element}{said}>" if element in VOID else f"<{element}{said}>{joined(children)}</{element}>")


def joined(children: Iterable[str]) -> Html:
    return Html("".join(child if isinstance(child, Html) else escaped(child) for child in children))


def escaped(text: str) -> str:
    """Also without characters that HTML does not allow."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", text))


def table(caption: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls on its own where it is too wide; columns whose header starts with > hold numbers."""
    classes = ["number" if header.startswith(">") else None for header in headers]
    head = [
        tag("th", header.lstrip(">"), scope="col", class_=class_)
        for header, class_ in zip(headers, classes, strict=True)
    ]
    body = [
        tag("tr", *(tag("td", cell, class_=class_) for cell, class_ in zip(row, classes, strict=True))) for row in rows
    ]
    content = tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("div", content, class_="scroll", tabindex="0", role="group", aria_label=caption)


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and what they are, one line each."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))


def folded(summary: str, *children: str) -> Html:
    return tag("details", tag("summary", summary), *children)


def picture(data: bytes, *, alt: str = "") -> Html:
    """The bytes of an image file, within the page."""
    kind = "png" if data.startswith(b"\x89PNG") else "webp"
    return tag("img", src=f"data:image/{kind};base64,{base64.b64encode(data).decode()}", alt=alt)


def _attribute(key: str, value: str | float | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escaped(str(value))}"'
