"""Whatever is wrong with packed data is found, and the first problem is named in one line."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vaejob.data.manifest import MANIFEST_KEY, Manifest, read_row_groups, write_manifest, write_row_groups
from vaejob.data.pack import pack
from vaejob.data.shards import Row, describe_shard, encode_shard
from vaejob.data.sources import ArraySource
from vaejob.data.verify import verify
from vaejob.errors import DataError
from vaejob.storage import Bucket, open_bucket

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
_addresses = (f"memory://test-verify-{i}" for i in itertools.count())


def packed(encoding: str = "raw") -> tuple[Bucket, Manifest]:
    dest = next(_addresses)
    manifest = pack(ArraySource("noise", IMAGES), dest, encoding=encoding, shard_bytes=400, row_group_bytes=200)[
        "train"
    ]
    return open_bucket(f"{dest}/train"), manifest


def refusal(bucket: Bucket) -> str:
    with pytest.raises(DataError) as caught:
        verify(bucket)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=100, deadline=None)
@given(shard=st.integers(0, 1), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(shard, place, bit):
    bucket, manifest = packed("keep")
    key = manifest.shards[shard].key
    data = bytearray(bucket.read(key))
    data[int(place * len(data))] ^= 1 << bit
    bucket.write(key, bytes(data))
    assert key in refusal(bucket)


def test_a_flipped_pixel_is_named_with_its_row_group():
    bucket, manifest = packed()
    second = read_row_groups(bucket, manifest)[manifest.shards[0].row_groups + 1]
    data = bytearray(bucket.read("00001.parquet"))
    data[int(second["offset"]) + int(second["size"]) - 1] ^= 1
    bucket.write("00001.parquet", bytes(data))
    assert f"{bucket.url}/00001.parquet row group 1: checksum is" in refusal(bucket)


def test_an_empty_a_short_and_a_missing_shard_are_named():
    bucket, manifest = packed()
    bucket.write("00001.parquet", b"")
    assert f"00001.parquet has 0 bytes, the manifest says {manifest.shards[1].size}" in refusal(bucket)
    bucket.write("00001.parquet", bucket.read("00000.parquet")[:-1])
    assert "00001.parquet has" in refusal(bucket)
    bucket.delete("00001.parquet")
    assert "00001.parquet is gone" in refusal(bucket)


def test_a_shard_of_another_data_set_is_found():
    bucket, manifest = packed()
    bucket.write("00001.parquet", bucket.read("00000.parquet"))
    shards = (manifest.shards[0], manifest.shards[0].model_copy(update={"key": "00001.parquet"}), *manifest.shards[2:])
    table, count = read_row_groups(bucket, manifest).copy(), manifest.shards[0].row_groups
    table[count : 2 * count] = table[:count]
    changes = {"shards": shards, "row_groups_sha256": write_row_groups(bucket, table)}
    write_manifest(bucket, manifest.model_copy(update=changes))
    assert "00001.parquet: its ids must be 6 to 11" in refusal(bucket)


def test_images_of_another_shape_or_none_are_found():
    bucket, manifest = packed("keep")
    write_manifest(bucket, manifest.model_copy(update={"height": 9}))
    assert "00000.parquet row group 0 image 0 is 1 x 8 x 8" in refusal(bucket)
    data = encode_shard([[Row(i, str(i), b"no image") for i in range(12)]], image_bytes=None)
    bucket.write("00000.parquet", data)
    shard, table = describe_shard("00000.parquet", data, image_bytes=None)
    changes = {"shards": (shard,), "row_groups_sha256": write_row_groups(bucket, table)}
    write_manifest(bucket, manifest.model_copy(update=changes))
    assert "00000.parquet row group 0 image 0 is no image that can be read" in refusal(bucket)


def test_a_wrong_fingerprint_is_found():
    bucket, manifest = packed()
    write_manifest(bucket, manifest.model_copy(update={"fingerprint": "0" * 64}))
    assert f"is {manifest.fingerprint}, the manifest says 0000" in refusal(bucket)


def test_a_folder_without_a_manifest_is_no_data_set():
    bucket, _ = packed()
    bucket.delete(MANIFEST_KEY)
    assert "holds no shards: no manifest.json is there" in refusal(bucket)


def test_the_command_line_packs_looks_and_verifies(tmp_path):
    from vaejob.cli import app

    np.savez(tmp_path / "noise.npz", images=IMAGES[:, 0])
    dest, run = str(tmp_path / "out"), CliRunner().invoke
    pack_it = ["pack", str(tmp_path / "noise.npz"), dest, "--split", "train=0.5,test=0.5"]
    first, again = run(app, pack_it), run(app, pack_it)
    assert first.exit_code == again.exit_code == 0
    assert f"vaejob inspect {dest}" in first.stdout
    assert again.stdout.count("already packed") == 2

    looked = json.loads(run(app, ["inspect", dest, "--json"]).stdout)["splits"]
    verified = json.loads(run(app, ["verify", dest, "--json"]).stdout)["splits"]
    assert verified == [split | {"verified": True} for split in looked]
    assert {split["split"]: split["shape"] for split in looked} == {"train": [1, 8, 8], "test": [1, 8, 8]}
    assert sum(split["images"] for split in looked) == 12
    for verb in ("inspect", "verify"):
        assert looked[0]["fingerprint"][:12] in run(app, [verb, looked[0]["address"]]).stdout
