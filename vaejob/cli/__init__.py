"""The command line: the only place that prints and exits."""

import sys
from typing import Annotated

import typer

from vaejob.cli import (
    data,
    diff,
    doctor,
    export,
    look,
    render,
    report,
    serve,
    settings,
    story,
    submit,
    tensorboard,
    train,
    use,
)
from vaejob.cli.terminal import warn
from vaejob.cli.verb import Verb, Verbs
from vaejob.errors import VaejobError
from vaejob.version import VERSION

app = typer.Typer(
    name="vaejob",
    cls=Verbs,
    help="Trains likelihood-based variational autoencoders on images in object storage, on a Ray cluster.",
    epilog="Every verb has an example: vaejob VERB -h. The shell completes verbs and options after: vaejob --install-completion",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"vaejob {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which this is.")
    ] = False,
) -> None:
    pass


PANELS = {
    "Begin": (train.quickstart, story.story),
    "Images": (data.pack, data.index, data.inspect, data.verify),
    "Training": (
        doctor.doctor,
        train.train,
        submit.submit,
        train.resume,
        submit.logs,
        submit.stop,
        render.render,
        settings.settings,
    ),
    "Runs": (look.runs, look.show, diff.diff, report.report, tensorboard.tensorboard),
    "Models": (use.evaluate, use.sample, use.reconstruct, use.interpolate, export.export, serve.serve),
}

for panel, verbs in PANELS.items():
    for verb in verbs:
        first_sentence = (verb.__doc__ or "").partition("\n")[0].partition(". ")[0].removesuffix(".")
        app.command(cls=Verb, rich_help_panel=panel, short_help=f"{first_sentence}.")(verb)


def main() -> None:
    """Runs a verb; an error that a person can mend is one line and a status of its own."""
    try:
        app()
    except VaejobError as error:
        warn(str(error))
        sys.exit(error.exit_status)
