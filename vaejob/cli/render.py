"""The verb that carries a job to a cluster's own language: render."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaejob.cli.terminal import say, say_json, warn

if TYPE_CHECKING:
    from vaejob.cluster.manifests.check import Checked

NEXT = {
    "kuberay": "kubectl apply -f {folder}",
    "slurm": "sbatch {folder}/job.sbatch",
    "ray-up": "ray up {folder}/cluster.yaml",
    "skypilot": "sky jobs launch --secret RAY_AUTH_TOKEN {folder}/task.yaml",
}


def render(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET CONFIG [KEY=VALUE]...",
            help="kuberay, slurm, ray-up or skypilot; a YAML file, its address in a bucket, or a recipe's name; settings laid "
            "over it. With --check: manifests, - for standard input.",
        ),
    ],
    out: Annotated[str | None, typer.Option(help="Folder to write the files to; without it they are printed.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check manifests as the cluster would, without one; exit 2 if it would refuse."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What --check finds, as one JSON value.")] = False,
) -> None:
    """What a cluster applies to run this job: a RayJob, a batch script, a cluster of machines, a task.

    \b
    Examples:
      vaejob render kuberay job.yaml deploy.image=NAME@sha256:... --out k8s
      kubectl apply -f k8s
      vaejob render slurm job.yaml deploy.workers_per_node=8 | sbatch
      vaejob render --check k8s/*.yaml
    """
    from vaejob.errors import UserError

    if check:
        _check(words, as_json=as_json)
        return
    if as_json:
        raise UserError("--json goes with --check; rendered files are text")
    if len(words) < 2:
        raise UserError(f"vaejob render takes a target and a configuration; there is only {words[0]!r}")
    _render(words[0], words[1], words[2:], out)


def _render(target: str, config: str, overrides: list[str], out: str | None) -> None:
    from vaejob import load_config
    from vaejob.cluster.manifests.targets import TARGETS
    from vaejob.cluster.manifests.targets import render as render_files
    from vaejob.errors import UserError

    if target not in TARGETS:
        raise UserError(f"the target is {target!r}; it must be one of {', '.join(TARGETS)}")
    files = render_files(target, load_config(config, *overrides))
    if out is None:
        print("---\n".join(files.values()), end="")
        return
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
            say(str(folder / name))
    except OSError as error:
        raise UserError(f"--out is {out}, which cannot be written: {error.strerror}") from None
    say(f"next: {NEXT[target].format(folder=folder)}")


def _check(names: list[str], *, as_json: bool) -> None:
    from vaejob.cluster.manifests.check import check_text
    from vaejob.errors import UserError

    checked = {name: check_text(_read(name), source=name) for name in names}
    if as_json:
        say_json([_as_json(name, one) for name, found in checked.items() for one in found])
    else:
        for name, found in checked.items():
            _say(name, found)
    wrong = [one for found in checked.values() for one in found if one.problems]
    if wrong:
        number = sum(len(one.problems) for one in wrong)
        total = sum(map(len, checked.values()))
        raise UserError(f"{number} problem{'s' if number > 1 else ''} in {len(wrong)} of {total} documents")


def _say(file: str, found: "list[Checked]") -> None:
    if not found:
        warn(f"{file} holds no document")
    for one in found:
        if not one.problems:
            say(
                f"{file}: {one.name}: ok{'' if one.known else ', as far as a kind without a schema here can be checked'}"
            )
        for problem in one.problems:
            say(f"{file}: {one.name}: {problem.path} {problem.message}")


def _as_json(file: str, one: "Checked") -> dict[str, object]:
    problems = [{"path": problem.path, "message": problem.message} for problem in one.problems]
    return {"file": file, "document": one.name, "known": one.known, "problems": problems}


def _read(name: str) -> str:
    from vaejob.errors import UserError

    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
