"""The table of settings: every one is there, the page is current, and what it says of a setting holds of a job."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vaejob.cli import app
from vaejob.cli.settings import every_setting, page, plain
from vaejob.config import JobConfig, parse_config
from vaejob.errors import UserError

PAGE = Path(__file__).parents[1] / "vaejob/recipes/settings.md"
LEAST: dict[str, dict[str, Any]] = {
    "run": {"name": "a", "bucket": "b"},
    "data": {"train": "c"},
    "training": {"images": 1},
}


def test_page_is_what_the_configuration_makes_of_it_now() -> None:
    assert PAGE.read_text() == page(every_setting()), "run: vaejob settings --markdown > vaejob/recipes/settings.md"


def test_table_names_the_settings_of_a_job_and_their_defaults() -> None:
    job = JobConfig.model_validate(LEAST).model_dump(mode="json")
    told = {setting.name: setting for setting in every_setting() if "[]" not in setting.key}
    assert [*told] == [f"{section}.{key}" for section in job for key in job[section]]
    for name, setting in told.items():
        section, key = name.split(".")
        if setting.default is None:
            assert key in LEAST[section], name
        else:
            chosen = yaml.safe_load(setting.default)
            assert str(job[section][key]) == str(float(chosen) if isinstance(job[section][key], float) else chosen), (
                name
            )


def test_every_number_has_a_unit_and_every_setting_a_sentence() -> None:
    for setting in every_setting():
        numeric = re.search(r"integer|number", setting.kind) is not None
        assert (setting.unit is not None) == numeric, setting
        assert len(setting.explanation.split()) >= 3, setting
        assert not re.search(r"\[[\w ]+\]$", setting.explanation), setting


def test_every_choice_named_is_a_choice_and_every_limit_a_limit() -> None:
    def problem(name: str, value: object) -> str:
        section, key = name.split(".")
        settings = {**LEAST, section: {**LEAST.get(section, {}), key: value}}
        try:
            parse_config(yaml.safe_dump(settings))
        except UserError as error:
            return str(error)
        return ""

    for setting in every_setting():
        if (
            re.fullmatch(r"[\w-]+(, [\w-]+)+", setting.kind)
            and setting.kind != "true, false"
            and "[]" not in setting.key
        ):
            # A choice may be at odds with another setting, but it is a choice.
            assert not [c for c in setting.kind.split(", ") if "must be '" in problem(setting.name, c)], setting
            assert "must be '" in problem(setting.name, "no such choice"), setting
        for sign, number in re.findall(r"([<>]=?) (\d+)", setting.kind):
            limit, up = int(number), 1 if sign[0] == ">" else -1
            outside = limit if sign in "<>" else limit - up
            assert setting.name in problem(setting.name, outside), (setting, outside)
            inside = (
                limit
                if "=" in sign
                else limit + up
                if "integer" in setting.kind
                else math.nextafter(limit, math.inf * up)
            )
            assert f"{setting.name} is {inside!r}" not in problem(setting.name, inside), (setting, inside)


def test_verb_tells_the_same_three_ways() -> None:
    run = CliRunner().invoke
    assert run(app, ["settings", "--markdown"]).stdout == PAGE.read_text()
    told = run(app, ["settings", "--json"])
    assert [row["setting"] for row in json.loads(told.stdout)] == [setting.name for setting in every_setting()]
    text = run(app, ["settings"]).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert [line.strip() for line in text.splitlines() if re.fullmatch(r"  \w+\.\S+", line)] == [s.name for s in every_setting()]  # fmt: skip
    words = " ".join(text.split())
    assert all(setting.explanation in words for setting in every_setting())


def test_one_section_is_shown_alone_and_an_unknown_one_names_the_others() -> None:
    rows = json.loads(CliRunner().invoke(app, ["settings", "optimizer", "--json"]).stdout)
    assert {row["section"] for row in rows} == {"optimizer"}
    assert len(rows) == len(JobConfig.model_validate(LEAST).optimizer.model_dump())
    assert plain([setting for setting in every_setting() if setting.section == "run"]).startswith("run: ")
    with pytest.raises(UserError, match="'optimiser' is not a section; the sections are run, data, model,"):
        CliRunner().invoke(app, ["settings", "optimiser"], catch_exceptions=False)


def test_verb_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from vaejob.cli import app; "
        "result = CliRunner().invoke(app, ['settings']); assert result.exit_code == 0, result.output; "
        "print([name for name in ('torch', 'ray', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
