"""What vaejob packs opens unchanged in the libraries people use, and what they save is read in place."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset
import pytest

from vaejob.data.batches import open_data
from vaejob.data.decode import encode_png
from vaejob.data.index import index
from vaejob.data.pack import pack
from vaejob.data.sources import ArraySource
from vaejob.data.verify import verify
from vaejob.storage import open_bucket

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 7), dtype=np.uint8)

Rows = list[tuple[int, str, bytes]]
"""Id, key and image of each, by id."""


class Packed(NamedTuple):
    folder: Path
    rows: Rows

    @property
    def shards(self) -> list[str]:
        return sorted(str(path) for path in self.folder.glob("*.parquet"))


@pytest.fixture(scope="module", params=["raw", "keep"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed")
    pack(ArraySource("noise", IMAGES), str(folder), encoding=request.param, shard_bytes=3000, row_group_bytes=1000)
    stored = [image.tobytes() if request.param == "raw" else encode_png(image) for image in IMAGES]
    found = Packed(folder / "train", [(i, f"{i:08d}", image) for i, image in enumerate(stored)])
    assert len(found.shards) > 2
    return found


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's libraries, without a network and with a cache of their own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hugging-face"))


def by_pandas(packed: Packed) -> Rows:
    frame = pd.concat(map(pd.read_parquet, packed.shards))
    return list(zip(frame["id"], frame["key"], frame["image"], strict=True))


def by_pyarrow(packed: Packed) -> Rows:
    rows = pyarrow.dataset.dataset(packed.shards).to_table().to_pylist()
    return [(row["id"], row["key"], row["image"]) for row in rows]


def by_duckdb(packed: Packed) -> Rows:
    with duckdb.connect() as connection:
        pattern = str(packed.folder / "*.parquet")
        return connection.execute("select id, key, image from read_parquet(?) order by id", [pattern]).fetchall()


@pytest.mark.parametrize("load", [by_pandas, by_pyarrow, by_duckdb])
def test_shards_open_unchanged(packed: Packed, load: Callable[[Packed], Rows]) -> None:
    assert load(packed) == packed.rows


def test_shards_open_in_datasets(packed: Packed, offline: None, tmp_path: Path) -> None:
    import datasets

    loaded = datasets.load_dataset("parquet", data_files=packed.shards, split="train", cache_dir=str(tmp_path / "c"))
    assert [(row["id"], row["key"], row["image"]) for row in loaded] == packed.rows


@pytest.mark.ray
def test_shards_open_in_ray_data(packed: Packed, tmp_path: Path) -> None:
    # In a process of its own, since Ray warns of much and leaves threads behind.
    script = (
        "import sys, pickle, ray\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])\n"
        "ray.data.DataContext.get_current().enable_progress_bars = False\n"
        "rows = ray.data.read_parquet(sys.argv[3:]).sort('id').take_all()\n"
        "with open(sys.argv[2], 'wb') as file:\n"
        "    pickle.dump([(row['id'], row['key'], bytes(row['image'])) for row in rows], file)\n"
        "ray.shutdown()\n"
    )
    out = tmp_path / "rows.pickle"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # its sockets need a short path
        command = [sys.executable, "-c", script, folder, str(out), *packed.shards]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pd.read_pickle(out) == packed.rows


def saved(folder: Path, images: np.ndarray, kind: str) -> Path:
    """A data set as `datasets` saves it: by to_parquet, or in the folders that push_to_hub makes."""
    import datasets
    from PIL import Image

    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["odd", "even"])})
    columns = {"image": pictures, "label": [i % 2 for i in range(len(images))]}
    whole = datasets.Dataset.from_dict(columns, features=features)
    parts = {"train": whole.select(range(40)), "test": whole.select(range(40, len(images)))}
    for split, part in parts.items():
        if kind == "to_parquet":
            folder.mkdir(exist_ok=True)
            part.to_parquet(folder / f"{split}.parquet", batch_size=16)
            continue
        (folder / "data").mkdir(parents=True, exist_ok=True)
        shards = 2 if split == "train" else 1
        for number in range(shards):
            name = f"{split}-{number:05d}-of-{shards:05d}.parquet"
            part.shard(shards, number, contiguous=True).to_parquet(folder / "data" / name, batch_size=16)
    return folder


@pytest.mark.parametrize("kind", ["to_parquet", "hub"])
def test_what_datasets_saved_is_read_in_place(kind: str, offline: None, tmp_path: Path) -> None:
    folder = saved(tmp_path / "photos", IMAGES, kind)
    found = index(str(folder))
    assert {name: (one.manifest.images, one.manifest.column) for name, one in found.items()} == {
        "train": (40, "image.bytes"),
        "test": (10, "image.bytes"),
    }
    for split, expected in (("train", IMAGES[:40]), ("test", IMAGES[40:])):
        assert verify(open_bucket(found[split].address)) == found[split].manifest
        np.testing.assert_array_equal(open_data(found[split].address).images(np.arange(len(expected))), expected)
    packed = pack(ArraySource("noise", IMAGES[:40]), str(tmp_path / "packed"))["train"]
    assert found["train"].manifest.fingerprint == packed.fingerprint


@pytest.mark.parametrize("compression", ["uncompressed", "snappy", "gzip", "zstd", "lz4_raw", "brotli"])
def test_what_duckdb_wrote_is_read_in_place(compression: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"label": range(50), "image": [encode_png(image) for image in IMAGES]})
    with duckdb.connect() as connection:
        connection.register("frame", frame)
        target = tmp_path / "train-0.parquet"
        connection.execute(f"copy frame to '{target}' (format parquet, compression {compression}, row_group_size 20)")
    found = index(str(tmp_path))["train"]
    assert verify(open_bucket(found.address)) == found.manifest
    np.testing.assert_array_equal(open_data(found.address).images(np.arange(50)), IMAGES)
