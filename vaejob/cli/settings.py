"""The verb that lists every setting of a job, and the page that is made of the same list: settings."""

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import typer

from vaejob.cli.terminal import say, say_json

WIDTH = 80
_PLAIN_UNITS = ("batches", "blocks", "bytes", "channels", "components", "images", "lanes", "nats", "retries", "rows", "seconds", "workers")  # fmt: skip
UNITS = dict(zip(_PLAIN_UNITS, _PLAIN_UNITS, strict=True)) | {
    "cpus": "CPU cores", "gib": "GiB", "gpus": "GPUs", "samples": "codes"
}  # fmt: skip
"""Of numbers, by a word of their key; a unit in brackets at the end of the description goes before."""

HEAD = """\
# Settings

Every setting of a job, made from `vaejob/config.py` by `vaejob settings --markdown`; a test holds the two together. A
configuration is YAML with one block for each section; `section.key=value` on the command line is laid over it, as in
`vaejob train job.yaml optimizer.learning_rate=3e-4`. Settings without a default must be set. What the numbers that come of
it mean is told in [numbers.md](../likelihood/numbers.md).
"""


class Setting(NamedTuple):
    """One row of the table."""

    section: str
    key: str
    kind: str
    default: str | None
    """As YAML; None: it must be set."""
    unit: str | None
    """None: what is set is no number."""
    explanation: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"


def settings(
    section: Annotated[str | None, typer.Argument(help="One section only, such as optimizer.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page that ships with the recipes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON value.")] = False,
) -> None:
    """Every setting of a job: its choices, its default, its unit, and a sentence.

    \b
    Examples:
      vaejob settings
      vaejob settings optimizer
    """
    from vaejob.errors import UserError

    found = every_setting()
    if section is not None:
        if section not in section_titles():
            raise UserError(f"{section!r} is not a section; the sections are {', '.join(section_titles())}")
        found = [setting for setting in found if setting.section == section]
    if as_json:
        say_json([{"setting": setting.name, **setting._asdict()} for setting in found])
    elif markdown:
        say(page(found).rstrip("\n"))
    else:
        say(plain(found).rstrip("\n"))


def section_titles() -> dict[str, str]:
    """What each section is about, in the order of the configuration."""
    from vaejob.config import JobConfig

    schema = JobConfig.model_json_schema()
    return {name: schema["$defs"][_type_of(schema, name)]["description"] for name in schema["properties"]}


def every_setting() -> list[Setting]:
    """In the order of the configuration."""
    from vaejob.config import JobConfig

    schema = JobConfig.model_json_schema()
    return [setting for name in schema["properties"] for setting in _of_section(schema, name, _type_of(schema, name))]


def _of_section(schema: dict[str, Any], section: str, kind: str, *, inside: str = "") -> Iterator[Setting]:
    """inside: the setting whose items are themselves sections, such as patches[]."""
    described = schema["$defs"][kind]
    for key, field in described["properties"].items():
        yield _setting(section, inside + key, field, required=key in described.get("required", ()))
        if item := field.get("items", {}).get("$ref"):
            yield from _of_section(schema, section, _name_in(item), inside=f"{key}[].")


def _setting(section: str, key: str, field: dict[str, Any], *, required: bool) -> Setting:
    described = re.fullmatch(r"(.*?)(?: \[([^\]]+)\])?", " ".join(field["description"].split()))
    assert described is not None, field
    explanation, unit = described.groups()
    of_key = [UNITS[word] for word in key.split("_") if word in UNITS]
    return Setting(
        section=section,
        key=key,
        kind=_kind(field),
        default=None if required else _as_yaml(field["default"]),
        unit=(unit or (of_key[-1] if of_key else None)) if _is_numeric(field) else unit,
        explanation=explanation,
    )


def page(found: list[Setting]) -> str:
    """Markdown: a table for each section."""
    lines = [HEAD]
    for section, title in section_titles().items():
        rows = [setting for setting in found if setting.section == section]
        if rows:
            lines += [
                f"## {section}",
                "",
                title,
                "",
                "| key | choices | default | unit | what it is |",
                "|---|---|---|---|---|",
            ]
            lines += [
                f"| `{row.key}` | {_cell(row.kind)} | {f'`{row.default}`' if row.default else 'must be set'} "
                f"| {row.unit or ''} | {_cell(row.explanation)} |"
                for row in rows
            ]
            lines.append("")
    return "\n".join(lines)


def plain(found: list[Setting]) -> str:
    """For a terminal of 80 columns."""
    lines = []
    for section, title in section_titles().items():
        rows = [setting for setting in found if setting.section == section]
        lines += [*_wrapped(f"{section}: {title}"), ""] if rows else []
        for row in rows:
            default = f"default {row.default}" if row.default else "must be set"
            facts = "; ".join((row.kind, default, *([row.unit] if row.unit else [])))
            lines += [f"  {row.name}", *_wrapped(facts, indent=6), *_wrapped(row.explanation, indent=6), ""]
    return "\n".join(lines)


def _wrapped(text: str, *, indent: int = 0) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)


def _type_of(schema: dict[str, Any], section: str) -> str:
    return _name_in(schema["properties"][section]["$ref"])


def _name_in(reference: str) -> str:
    return reference.rpartition("/")[2]


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_numeric(field: dict[str, Any]) -> bool:
    if "anyOf" in field:
        return any(_is_numeric(one) for one in field["anyOf"])
    kind = field.get("items", {}).get("type") if field.get("type") == "array" else field.get("type")
    return kind in ("integer", "number")


def _kind(field: dict[str, Any]) -> str:
    """What may be set, out of the JSON schema that pydantic makes of a field."""
    match field:
        case {"enum": choices}:
            return ", ".join(choices)
        case {"anyOf": alternatives}:
            return " or ".join(_kind(one) for one in alternatives if one.get("type") != "null")
        case {"type": "array", "prefixItems": items}:
            return f"[{', '.join(_kind(item) for item in items)}]"
        case {"type": "array", "items": {"$ref": _}}:
            return "list of sections"
        case {"type": "array", "items": items}:
            return f"list of {_kind(items)}s" if items["type"] == "integer" else "list of texts"
        case {"type": "object"}:
            return "names with values"
        case {"type": "boolean"}:
            return "true, false"
        case {"type": "string"}:
            return "text"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]}" for name, sign in bounds.items() if name in field]
    return " ".join([field["type"], ", ".join(limits)]).rstrip()


def _cell(text: str) -> str:
    """Without what Markdown would read as the end of a cell, as HTML, or as emphasis."""
    return re.sub(r"([|<*\\])", r"\\\1", text)
