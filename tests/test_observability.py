"""What deploy/observability asks Prometheus for is there, its alerts come when they should, and the image is as it must be."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from vaejob import errors
from vaejob.cluster.gauges import METRICS, SPLITS, exported_name
from vaejob.errors import STOPPED_STATUS, VaejobError
from vaejob.storage.fence import TakenOver

DEPLOY = Path(__file__).parents[1] / "deploy"
OBSERVABILITY = DEPLOY / "observability"
EXPORTED = {exported_name(name) for name in METRICS}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def dashboard() -> dict[str, Any]:
    return dict(json.loads((OBSERVABILITY / "dashboard.json").read_text()))


def panel_queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_)?vaejob_\w+", text))


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    assert program, "no promtool: it is in Debian's package prometheus"
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_every_query_is_of_metrics_that_a_job_exports_and_each_of_those_is_shown() -> None:
    assert names_in((OBSERVABILITY / "alerts.yaml").read_text()) <= EXPORTED
    assert names_in((OBSERVABILITY / "alerts_test.yaml").read_text()) <= EXPORTED
    shown = names_in((OBSERVABILITY / "dashboard.json").read_text())
    of_alerts_alone = {"ray_vaejob_checkpoint_every_images", "ray_vaejob_start_timestamp_seconds"}
    assert shown == EXPORTED - of_alerts_alone
    assert names_in((DEPLOY / "README.md").read_text()) == METRICS.keys()


@pytest.mark.parametrize("query", [*panel_queries(), *(rule["expr"] for rule in rules())])
def test_queries_use_labels_that_the_metric_has(query: str) -> None:
    labels = {exported_name(name): {"run", *metric.labels} for name, metric in METRICS.items()}
    for name, selector in re.findall(r"\b(ray_vaejob_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*=~?", selector)) <= labels[name]
    for split in re.findall(r'split="(\w+)"', query):
        assert split in SPLITS.values()


def test_rules_and_panels_are_promql(tmp_path: Path) -> None:
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", str(OBSERVABILITY / "alerts.yaml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    queries = [query.replace("$__rate_interval", "1m").replace("$run", ".*") for query in panel_queries()]
    records = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    checked = promtool("check", "rules", str(tmp_path / "panels.yaml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(queries)} rules found" in checked.stdout


def test_alerts_come_when_they_should_and_not_otherwise() -> None:
    done = promtool("test", "rules", str(OBSERVABILITY / "alerts_test.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_firing_and_seen_silent() -> None:
    tests = yaml.safe_load((OBSERVABILITY / "alerts_test.yaml").read_text())["tests"]
    cases = [(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]]
    assert set(cases) == {(rule["alert"], fires) for rule in rules() for fires in (True, False)}


def test_panels_lie_beside_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in dashboard()["panels"]):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_runbook_has_a_row_for_each_alert_and_each_exit_status() -> None:
    rows = [line for line in (DEPLOY / "README.md").read_text().splitlines() if line.startswith("|")]
    of_alerts = {found[1] for line in rows if (found := re.match(r"\| `(Vaejob\w+)` \|", line))}
    assert of_alerts == {rule["alert"] for rule in rules()}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VaejobError)]
    statuses = {0, STOPPED_STATUS, TakenOver.exit_status, *(kind.exit_status for kind in kinds)}
    of_statuses = {int(found[1]) for line in rows if (found := re.match(r"\| exit (\d+)\b", line))}
    assert of_statuses >= statuses


def test_dockerfile_has_nothing_to_mend() -> None:
    beside_python = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [beside_python, "--failure-threshold=style", "--format=tty", str(DEPLOY / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_image_runs_as_the_user_of_the_rendered_pods() -> None:
    (user,) = re.findall(r"^USER (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    rendered = (DEPLOY / "kuberay" / "rayjob.yaml").read_text()
    assert {f"{uid}:1000" for uid in re.findall(r"runAsUser: (\d+)", rendered)} == {user}
    assert set(re.findall(r"runAsGroup: (\d+)", rendered)) <= {"1000"}


def test_image_is_made_of_what_docker_is_shown_and_of_pinned_packages() -> None:
    dockerfile, root = (DEPLOY / "Dockerfile").read_text(), DEPLOY.parent
    copied = {name for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for name in line.split()[:-1]}
    shown = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == shown
    assert all((root / name).exists() for name in copied)
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = {line.partition("==")[0].lower() for line in (root / "constraints.txt").read_text().splitlines()}
    assert {re.split(r"[\[>=]", name)[0].lower() for name in wanted} <= pins
