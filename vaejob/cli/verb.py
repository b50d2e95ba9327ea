"""What all verbs share: help that reads as help does elsewhere, and a wrong address said before anything slow is loaded."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _Usual:
    """Usage in capitals, RUN or [KEY=VALUE]..., and no type behind a switch, which takes no value, nor behind an argument."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [_usual(piece) for piece in pieces]


class Verb(_Usual, TyperCommand):
    """One verb."""


class Verbs(_Usual, TyperGroup):
    """All of them."""


def _usual(piece: str) -> str:
    """{run} as RUN, {RUN...}... as RUN..., [[KEY=VALUE]...]... as [KEY=VALUE]...: once is enough."""
    if piece.startswith("{"):
        piece = piece.replace("{", "").replace("}", "")
        return piece.upper() if piece.islower() else piece.replace("......", "...")
    return piece[1:].removesuffix("]...") if piece.startswith("[[") else piece


def require_run(*addresses: str) -> None:
    """Raises RunError, or what the bucket raises, where no run is; loads no torch."""
    from vaejob.storage import absolute, open_bucket
    from vaejob.storage.runs import read_job

    for address in addresses:
        read_job(open_bucket(absolute(address)))
