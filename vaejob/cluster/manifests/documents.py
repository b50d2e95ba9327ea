"""YAML as a cluster reads it: written with comments that say why, read with nothing guessed or lost."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from vaejob.errors import UserError

COMMENT_COLUMNS = 100


def to_yaml(document: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """The document, keys in their order, with each comment above what its path names.

    A path reads spec.containers[ray-head].env[HOME]: items of lists go by their name, '' is the top of the document. A
    comment on what the document does not have is left out.
    """
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10**6, allow_unicode=True)
    places = dict(reversed(list(_places(yaml.compose(text, Loader=yaml.SafeLoader), ""))))
    above: dict[int, list[str]] = {}
    for path, comment in (comments or {}).items():
        if path and path not in places:
            continue
        line, column = places.get(path, (0, 0))
        paragraphs = [textwrap.wrap(part, max(40, COMMENT_COLUMNS - column)) for part in comment.splitlines()]
        above[line] = [f"{' ' * column}# {part}".rstrip() for lines in paragraphs for part in lines or [""]]
    lines = text.splitlines()
    return "".join(f"{line}\n" for number, own in enumerate(lines) for line in [*above.get(number, []), own])


def _places(node: yaml.Node | None, path: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Where each key and each item of a list begins, as (line, column)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else key.value
            yield inner, (key.start_mark.line, key.start_mark.column)
            yield from _places(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            inner = f"{path}[{_name_of(item)}]"
            yield inner, (item.start_mark.line, item.start_mark.column - 2)  # 2: of "- "
            yield from _places(item, inner)


def _name_of(item: yaml.Node) -> str:
    pairs = item.value if isinstance(item, yaml.MappingNode) else []
    return next((str(value.value) for key, value in pairs if key.value in ("name", "groupName")), "")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def read_documents(text: str, *, source: str) -> list[Any]:
    """Every document of a file that is not empty. Raises UserError for what is not YAML, or has a key twice."""
    try:
        return [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """Dates stay text, as for Kubernetes, and a key that stands twice is an error instead of the last one winning."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)
