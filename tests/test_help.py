"""Help is where the hand reaches, and comes at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from vaejob.cli import app

VERBS = sorted(typer.main.get_group(app).commands)
SLOW_TO_LOAD = ("torch", "ray", "numpy", "pyarrow", "matplotlib")
LOADED = f"""
import sys
from vaejob.cli import main
try:
    main()
finally:
    print("loaded:", *sorted(set(sys.modules) & set({SLOW_TO_LOAD})), file=sys.stderr)
"""


def vaejob_says(*arguments: str) -> tuple[int, str, str]:
    """Exit status, what was said without its frames and line breaks, and which slow packages were loaded."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert all(len(line) <= 80 for line in done.stdout.splitlines()), done.stdout
    said, _, loaded = (done.stdout + done.stderr).rpartition("loaded:")
    return done.returncode, " ".join(said.replace("│", " ").split()), loaded.strip()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_that_names_it(verb: str) -> None:
    help_text = typer.main.get_group(app).commands[verb].help or ""
    _, found, examples = help_text.partition("Example")
    assert found
    assert f"  vaejob {verb} " in examples
    assert max(map(len, examples.splitlines())) <= 78  # two of 80 columns are a margin: whole, for who copies it


def test_help_of_all_and_of_a_verb_loads_nothing_slow() -> None:
    status, said, loaded = vaejob_says("-h")
    assert (status, loaded) == (0, "")
    assert "vaejob VERB -h" in said
    assert "vaejob --install-completion" in said
    status, said, loaded = vaejob_says("train", "-h")
    assert (status, loaded) == (0, "")
    assert "Example: vaejob train mnist-iwae-1" in said
    assert "train [OPTIONS] CONFIG [KEY=VALUE]... Train" in said
    assert "<bool>" not in said  # a switch takes no value
    assert "report [OPTIONS] RUN... Write" in vaejob_says("report", "-h")[1]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("evalute", "run"), "Did you mean 'evaluate'?"),
        (("train", "--quite"), "--quiet"),
        (("evaluate", "run", "--sample", "5"), "--samples"),
    ],
)
def test_misspelt_verbs_and_options_get_the_nearest_name_at_once(typed: tuple[str, ...], meant: str) -> None:
    status, said, loaded = vaejob_says(*typed)
    assert (status, loaded) == (2, "")
    assert meant in said


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("train", "quickstart", "model.hiden=[3]"), "model.hidden"),
        (("train", "quikstart"), "did you mean quickstart?"),
        (
            ("train", "quickstart", "deploy.env={AWS_SECRET_ACCESS_KEY: abcdefghij}"),
            "deploy.env.AWS_SECRET_ACCESS_KEY holds",
        ),
        (("submit", "quickstart", "training.images=many", "--address", "http://127.0.0.1:1"), "training.images"),
    ],
)
def test_wrong_settings_are_refused_at_once(typed: tuple[str, ...], meant: str) -> None:
    status, said, loaded = vaejob_says(*typed)
    assert (status, loaded) == (2, "")
    assert meant in said
    assert "abcdefghij" not in said


THAT_READ_A_RUN = (
    "show {0}", "show {0} --watch", "runs {0}", "diff {0} {0}", "report {0}", "tensorboard {0}", "evaluate {0}",
    "sample {0} --out x.png", "reconstruct {0} --out x.png", "interpolate {0} --out x.png", "export {0} --out x",
    "serve {0}", "resume {0}", "doctor {0}/job.yaml",
)  # fmt: skip
EACH = f"""
import sys
from vaejob.cli import main
address = sys.argv[1]
for verb in {THAT_READ_A_RUN}:
    sys.argv = ["vaejob", *verb.format(address).split()]
    try:
        main()
    except SystemExit as ended:
        print(verb, ended.code)
print("loaded:", *sorted({{"torch", "ray", "matplotlib"}} & set(sys.modules)))
"""


def test_an_address_without_a_run_is_refused_before_anything_slow_is_loaded(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", EACH, str(tmp_path)], capture_output=True, text=True, check=True)
    *ends, loaded = done.stdout.splitlines()
    assert ends == [f"{verb} 2" for verb in THAT_READ_A_RUN]
    assert loaded == "loaded:"
    said = done.stderr.splitlines()
    assert len(said) == len(THAT_READ_A_RUN)  # one line each
    assert all(str(tmp_path) in line for line in said)


def test_shell_completion_knows_verbs_and_options() -> None:
    for words, wanted in (("vaejob tr", {"train"}), ("vaejob train --qu", {"--quiet"})):
        environment = {"_VAEJOB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-c", "import sys; sys.argv[0] = 'vaejob'; from vaejob.cli import main; main()"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert set(done.stdout.split()) == wanted, done.stderr
