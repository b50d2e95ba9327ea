"""Nothing that lies in a bucket is executed, no credential is shown, and no key goes over a network in the clear."""

import ast
import hashlib
import json
import pickle
import re
import secrets
import struct
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vaejob
from tests.test_checkpoint import Bomb, commit, trained_state
from tests.test_every_family import job_of
from tests.test_stability import pack_digits
from vaejob.cluster.manifests.documents import read_documents
from vaejob.config import parse_config
from vaejob.data.sources import open_source
from vaejob.errors import BucketError, CheckpointError, ConfigError, DataError, UserError
from vaejob.export import export
from vaejob.loaded import EXPORT_MARKER
from vaejob.run import restorable
from vaejob.storage import open_bucket
from vaejob.storage.remote import RemoteBucket
from vaejob.storage.runs import write_record
from vaejob.storage.secrets import redact, redacted

PACKAGE = Path(vaejob.__file__).parent

UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.jit.load",
    "torch.hub.load",
    "pandas.read_pickle",
}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
ALLOWED = {
    # What a task of ours has returned through Ray, which itself speaks pickle to whoever holds the cluster's token.
    "cluster/pack.py: import pickle",
    "cluster/pack.py: pickle.dumps(found)",
    "cluster/pack.py: pickle.loads(row['found'])",
    # Its loader is a subclass of PyYAML's safe one; a test below gives it what would be executed.
    "cluster/manifests/documents.py: yaml.load_all(text, Loader=_Loader)",
}


def unsafe_calls(source: str) -> Iterator[str]:
    """Calls that may execute what they read, by whatever name their module was imported, and imports of such modules."""
    tree = ast.parse(source)
    full = dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                top = name.name.partition(".")[0]
                full |= {name.asname: name.name} if name.asname else {top: top}
                if top in UNSAFE_MODULES:
                    yield f"import {name.name}"
        elif isinstance(node, ast.ImportFrom):
            full |= {(name.asname or name.name): f"{node.module}.{name.name}" for name in node.names}
            if (node.module or "").partition(".")[0] in UNSAFE_MODULES:
                yield f"from {node.module} import {node.names[0].name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_unsafe(node, full):
            yield ast.unparse(node)


def _is_unsafe(call: ast.Call, full: dict[str, str]) -> bool:
    first, dot, rest = ast.unparse(call.func).partition(".")
    name = full.get(first, first) + dot + rest
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    module, _, verb = name.rpartition(".")
    return (
        module.partition(".")[0] in UNSAFE_MODULES
        or name in UNSAFE_CALLS
        or (name in ("torch.load", "torch.serialization.load") and given.get("weights_only") != "True")
        or (name in ("numpy.load", "numpy.lib.npyio.load") and given.get("allow_pickle") != "False")
        or (module == "yaml" and verb in UNSAFE_YAML)
        or given.get("shell", "False") != "False"
        or given.get("allow_pickle", "False") != "False"
    )


def test_no_source_of_the_package_executes_what_it_reads() -> None:
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}: {call}"
        for path in PACKAGE.rglob("*.py")
        for call in unsafe_calls(path.read_text())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(file)",
        "import pickle as p\np.loads(data)",
        "from pickle import loads\nloads(data)",
        "from pickle import loads as parse\nparse(data)",
        "import pickle\npickle.Unpickler(file).load()",
        "import joblib\njoblib.load(path)",
        "from cloudpickle import loads\nmap(loads, rows)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import full_load\nfull_load(text)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(line)",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "import pandas as pd\npd.read_pickle(path)",
    ],
)
def test_the_walk_over_the_sources_finds(code: str) -> None:
    assert list(unsafe_calls(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "import re\nre.compile(text)",
    ],
)
def test_the_walk_over_the_sources_lets_pass(code: str) -> None:
    assert not list(unsafe_calls(code))


def test_npz_of_pickled_objects_is_refused_without_running_them(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    np.savez(tmp_path / "a.npz", images=np.array([Bomb(ran)], dtype=object))
    with pytest.raises(DataError, match=r"a.npz is no npz file of plain arrays: Object arrays cannot be loaded"):
        open_source(str(tmp_path / "a.npz"))
    assert not ran.exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as file:  # who would load it would run it
        assert file["images"].shape == (1,)
    assert ran.exists()


@pytest.mark.parametrize("tag", ["object/apply:pathlib.Path.touch", "object/new:pathlib.Path.touch", "name:os.system"])
def test_yaml_that_names_code_is_refused_without_running_it(tag: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    text = f"run: !!python/{tag} [{ran}]\n"
    with pytest.raises(ConfigError, match=r"^job.yaml is not YAML: could not determine a constructor") as refused:
        parse_config(text, source="job.yaml")
    with pytest.raises(UserError, match=r"^manifest.yaml is not YAML: could not determine a constructor"):
        read_documents(text, source="manifest.yaml")
    assert "\n" not in str(refused.value)
    assert not ran.exists()
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"job.yaml is not YAML"):
        vaejob.load_config(str(tmp_path / "job.yaml"))


def safetensors_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], *offsets: int, dtype: str = "F32") -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}}


HOSTILE = {
    "empty": b"",
    "a header longer than the file": safetensors_file({}, length=2**63),
    "a header of gigabytes": safetensors_file({}, length=2**32),
    "no JSON": safetensors_file(b"\x80\x04cos\nsystem\n"),
    "JSON too deep": safetensors_file(b"[" * 100_000),
    "bytes outside the file": safetensors_file(tensor([1024], 0, 4096), b"1234"),
    "bytes before their beginning": safetensors_file(tensor([1], 8, 4), bytes(8)),
    "negative bytes": safetensors_file(tensor([1], -4, 0), bytes(4)),
    "a shape that overflows": safetensors_file(tensor([2**40, 2**40], 0, 4), bytes(4)),
    "a shape that is not its bytes": safetensors_file(tensor([7], 0, 4), bytes(4)),
    "overlapping tensors": safetensors_file(
        {**tensor([2], 0, 8), "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)
    ),
    "a hole": safetensors_file(tensor([1], 4, 8), bytes(8)),
    "an unknown type": safetensors_file(tensor([1], 0, 4, dtype="OBJECT"), bytes(4)),
    "bytes behind its end": safetensors_file(tensor([1], 0, 4), bytes(4096)),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_state_with_a_hostile_header_is_passed_over_in_one_line(how: str, tmp_path: Path) -> None:
    """Its record vouches for it: size and checksum are right."""
    run, tensors = open_bucket(str(tmp_path)), trained_state()
    commit(tmp_path, tensors, images_seen=10, world_size=1)
    record = commit(tmp_path, tensors, images_seen=20, world_size=1)
    run.write(record.files[0].key, HOSTILE[how])
    sha256 = hashlib.sha256(HOSTILE[how]).hexdigest()
    file = record.files[0].model_copy(update={"size": len(HOSTILE[how]), "sha256": sha256})
    write_record(run, record.model_copy(update={"files": (file,)}))
    chosen, restored, (note,) = restorable(run)
    assert chosen is not None
    assert chosen.images_seen == 10
    assert restored is not None
    assert restored.keys() == tensors.keys()
    assert note.startswith("passed over the checkpoint at 20 images: ")
    assert "is no safetensors file" in note
    assert "\n" not in note
    assert len(note) < 500


def test_export_with_hostile_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    vaejob.train(job_of("mlp", pack_digits(tmp_path / "digits"), tmp_path / "bucket", "training.images=128"))
    out = tmp_path / "out"
    export(vaejob.load(str(tmp_path / "bucket/run")), out, numbers="")
    marker = json.loads((out / EXPORT_MARKER).read_text())
    for hostile in (*HOSTILE.values(), pickle.dumps(Bomb(tmp_path / "ran"))):
        (out / "model.safetensors").write_bytes(hostile)
        marker["sha256"]["model.safetensors"] = hashlib.sha256(hostile).hexdigest()
        (out / EXPORT_MARKER).write_text(json.dumps(marker))
        with pytest.raises(CheckpointError, match=r"is damaged \(SafetensorError\)"):
            vaejob.load(str(out))
    assert not (tmp_path / "ran").exists()


SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@models/runs", "s3://***@models/runs carries a login"),
        (f"s3://me:{SECRET}@models", "s3://***@models carries a login"),
        (f"s3://me:1/{SECRET}@models", "s3://***@models carries a login"),
        (f"s3://{SECRET.replace('/', '')}@models/runs", "s3://***@models/runs carries a login"),
        (f"s3://me:{SECRET}", "s3://*** carries a login"),
        (f"s3://models:{SECRET}/runs", "s3://*** carries a login"),
        (f"gs://me:{SECRET}@models", "gs://***@models carries a login"),
        (f"az://models/runs?sv=2024-11-04&sig={SECRET}", "az://models/runs?*** carries a signature"),
        (f"s3://models/r?X-Amz-Credential=me&X-Amz-Signature={SECRET}", "s3://models/r?*** carries a signature"),
        (f"s3://models/r?AWSAccessKeyId=me&Signature={SECRET}", "s3://models/r?*** carries a signature"),
        (f"https://me:{SECRET}@models.example/runs", "https://***@models.example/runs carries a login"),
        (f"s3a://me:{SECRET}@models/runs", "s3a://***@models/runs carries a login"),
    ],
)
def test_address_that_carries_a_credential_is_refused_without_repeating_it(address: str, shown: str) -> None:
    for use in (open_bucket, lambda address: vaejob.load_config(f"{address}/job.yaml"), vaejob.open_data, vaejob.load):
        with pytest.raises(UserError, match=r"; take it out, and put credentials into the environment") as refused:
            use(address)
        line = str(refused.value)
        assert line.startswith(shown if use is open_bucket else shown.partition(" carries")[0])
        assert "\n" not in line
        assert not [part for part in re.split("[/+]", SECRET) if part in line]


@pytest.mark.parametrize(
    "address", ["s3://models/a:b", "s3://models/me@home/run", "gs://m.example/x?y=1", "az://c/sig=1"]
)
def test_address_that_only_looks_odd_is_taken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AZURE_STORAGE_ACCOUNT_NAME": "a"}
    for name, value in (keys | {"GOOGLE_SKIP_SIGNATURE": "true", "AZURE_SKIP_SIGNATURE": "true"}).items():
        monkeypatch.setenv(name, value)
    assert open_bucket(address).url == address


@pytest.fixture
def keys_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ALLOW_HTTP", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


@pytest.mark.parametrize("variable", ENDPOINTS)
@pytest.mark.parametrize(
    "endpoint",
    ["https://minio.example:9000", "http://127.0.0.1:9000", "http://127.8.8.8", "http://localhost:9000", "http://LOCALHOST",
     "http://[::1]:9000", "HTTPS://minio.example"],
)  # fmt: skip
@pytest.mark.usefixtures("keys_in_environment")
def test_https_and_loopback_are_taken(variable: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, endpoint)
    open_bucket("s3://models")


@pytest.mark.parametrize("variable", ENDPOINTS)
@pytest.mark.parametrize(
    "endpoint",
    ["http://10.0.0.5:9000", "http://minio:9000", "http://localhost.example:9000", "http://127.0.0.1.example", "HTTP://10.0.0.5",
     "http://[fe80::1]:9000", "http://0.0.0.0:9000"],
)  # fmt: skip
@pytest.mark.usefixtures("keys_in_environment")
def test_plain_http_over_a_network_is_refused_unless_allowed(
    variable: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, endpoint)
    with pytest.raises(
        UserError, match=rf"^{variable} is .*; it must be https, or AWS_ALLOW_HTTP=true must be set"
    ) as refused:
        open_bucket("s3://models")
    assert endpoint in str(refused.value)
    assert "\n" not in str(refused.value)
    for word in ("false", "", "0"):
        monkeypatch.setenv("AWS_ALLOW_HTTP", word)
        with pytest.raises(UserError):
            open_bucket("s3://models")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    open_bucket("s3://models")


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        (f"https://me:{SECRET}@minio.example", "carries a login or a signature"),
        (f"http://me:{SECRET}@127.0.0.1:9000", "carries a login or a signature"),
        (f"https://minio.example/?X-Amz-Signature={SECRET}", "carries a login or a signature"),
        ("minio.example:9000", "must read https://host"),
        ("ftp://minio.example", "must read https://host"),
        ("https://", "must read https://host"),
    ],
)
@pytest.mark.usefixtures("keys_in_environment")
def test_endpoint_that_is_none_is_one_line(endpoint: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=says) as refused:
        open_bucket("s3://models")
    assert "\n" not in str(refused.value)
    assert not [part for part in re.split("[/+]", SECRET) if part in str(refused.value)]


class Echo(BaseHTTPRequestHandler):
    """Refuses every request with an answer that repeats all of it, as proxies and debugging servers do."""

    def do_GET(self) -> None:
        body = f"you said {self.path} with {dict(self.headers)} at https://x.example/?X-Amz-Signature={SECRET[::-1]}".encode()
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def echo() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.usefixtures("keys_in_environment")
def test_answer_that_repeats_a_credential_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    token = f"IQoJb3JpZ2luX2VjE{secrets.token_urlsafe(32)}"
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    with echo() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        bucket = RemoteBucket("s3://models", deadline_s=0.5)
        with pytest.raises(Exception, match="you said") as raw:
            obstore.get(bucket._store, "a")
        assert token in str(raw.value)  # planted
        assert SECRET[::-1] in str(raw.value)
        with pytest.raises(BucketError) as ours:
            bucket.read("a")
    told = "".join(traceback.format_exception(ours.value))  # what a log would show, causes and all
    assert "you said" in told
    for secret in (token, SECRET, SECRET[::-1], "AKIAIOSFODNN7EXAMPLE"):
        assert secret not in told
    assert re.search(r"authorization['\"]*: ['\"]*\*\*\*", told)


LETTERS = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="@\"'<>&?#)/:*")
PLANTED = st.text(LETTERS, min_size=8, max_size=60)


@given(secret=PLANTED.map(lambda text: f"S{text}S"), host=st.sampled_from(["h.example", "h.example:9000", "models"]))
def test_credentials_are_redacted_by_their_shape(secret: str, host: str) -> None:
    for text in (
        f"s3://KEY:{secret}@{host}/a",
        f"https://me:{secret}@{host}/a?b=c",
        f"https://{secret}@{host}/a",
        f"GET https://{host}/a?X-Amz-Algorithm=x&X-Amz-Signature={secret}&b=c",
        f"https://{host}/a?sv=1&sig={secret}",
        f"authorization: AWS4-HMAC-SHA256 Credential=me, Signature={secret}",
        f"{{'Authorization': 'Bearer {secret}'}}",
        f'"x-amz-security-token": "{secret}"',
    ):
        shown = redacted(f"it failed: {text} (and so on)")
        assert secret not in shown, shown
        assert shown.startswith("it failed: ")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a:b@c/d: gave up after 2 s and 5 attempts: Connection refused",
        "http://127.0.0.1:9000/bucket/me@home is not there",
        "http://[::1]:9000/bucket/a@b",
        "the sum is 3: 1 + 2 @ 4",
        "https://host.example/a?size=64&signal=7",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "AZURE_STORAGE_SAS_TOKEN", "DB_PASSWORD"]
)
def test_credentials_of_the_environment_are_redacted_by_their_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_urlsafe(24)
    monkeypatch.setenv(name, secret)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token-of-this-pod")
    first, second = ValueError(f"bad: {secret}"), RuntimeError(f"{secret} at /var/run/secrets/token-of-this-pod", 7)
    second.__cause__ = first
    first.__context__ = second  # a ring
    redact(second)
    assert second.args == ("*** at /var/run/secrets/token-of-this-pod", 7)
    assert first.args == ("bad: ***",)
