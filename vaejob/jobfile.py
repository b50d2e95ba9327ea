"""A job's configuration, from wherever it is written; no torch, no ray, so that what is wrong with it is said at once."""

import difflib
from importlib import resources
from pathlib import Path

from vaejob.config import JobConfig, parse_config
from vaejob.errors import ConfigError, ObjectMissing
from vaejob.storage import absolute, open_bucket, split_address
from vaejob.storage.credentials import credentials_in


def recipes() -> list[str]:
    """Names of the jobs that ship with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in resources.files("vaejob.recipes").iterdir()
                  if path.name.endswith(".yaml"))  # fmt: skip


def load_config(address: str, overrides: tuple[str, ...] = ()) -> JobConfig:
    """The job at an address: a file, s3://.../job.yaml, or a recipe's name. Raises ConfigError, or what a bucket raises."""
    if address in recipes() and not Path(address).exists():
        text = resources.files("vaejob.recipes").joinpath(f"{address}.yaml").read_text()
    else:
        folder, name = split_address(address)
        try:
            text = open_bucket(folder).read(name).decode()
        except (ObjectMissing, UnicodeDecodeError):
            near = difflib.get_close_matches(address, recipes(), n=1, cutoff=0.6)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{address} is neither a configuration file nor a recipe ({', '.join(recipes())}){meant}"
            ) from None
    job = parse_config(text, overrides, source=address)
    for path, what in credentials_in(job.model_dump()):
        raise ConfigError(
            f"{path} holds {what}; a run keeps its configuration in its bucket: leave credentials to the environment of each "
            "machine, or name a Kubernetes Secret in deploy.secret_name"
        )
    # The addresses are kept as they read from any working directory: of a worker, or of a later resume.
    run = job.run.model_copy(update={"bucket": absolute(job.run.bucket)})
    data = job.data.model_copy(
        update={"train": absolute(job.data.train), "test": absolute(job.data.test) if job.data.test else None}
    )
    return job.model_copy(update={"run": run, "data": data})
