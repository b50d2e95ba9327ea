"""Every command of the README does what the README says, word for word, with a real bucket, cluster and photographs."""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.job.conftest import picture_size

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_opens_with_the_two_commands() -> None:
    first = [line.split("#")[0].split() for line in blocks("sh")[0].strip().splitlines()]
    assert first == [["make", "quickstart"], ["make", "test"]]
    makefile = (README.parent / "Makefile").read_text()
    assert "vaejob quickstart" in makefile
    assert "-m pytest" in makefile


def test_tree_names_every_file_and_no_other() -> None:
    tree = README.read_text().partition("## The house")[2]
    named = Counter(re.findall(r"\w+\.py", tree))  # some names stand in several folders
    there = Counter(path.name for path in (README.parent / "vaejob").rglob("*.py") if not path.name.startswith("__"))
    assert named == there


@pytest.mark.ray
@pytest.mark.s3
def test_commands_of_the_readme_run(
    tmp_path: Path, s3_bucket: str, ray_head: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, in one folder; only the names of the reader's own bucket and cluster are filled in."""

    def filled_in(text: str) -> str:
        return text.replace("s3://my-bucket", s3_bucket).replace("http://HEAD:8265", ray_head["RAY_API_SERVER_ADDRESS"])

    photos = tmp_path / "photos"
    photos.mkdir()
    for index, gradient in enumerate((Image.linear_gradient("L"), Image.radial_gradient("L")) * 20):
        gradient.rotate(9 * index).resize((24, 20)).convert("RGB").save(photos / f"{index}.png")
    (tmp_path / "job.yaml").write_text(filled_in(blocks("yaml")[0]))
    environment = {**os.environ, **ray_head, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    commands = [line for block in blocks("sh")[1:] for line in block.strip().splitlines() if line.startswith("vaejob ")]
    assert len(commands) >= 10
    for command in commands:
        done = subprocess.run(
            shlex.split(filled_in(command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert min(picture_size(tmp_path / "samples.png")) > 64
    assert min(picture_size(tmp_path / "reconstructions.png")) >= 64

    monkeypatch.chdir(tmp_path)
    exec(filled_in(blocks("python")[0]), {})
