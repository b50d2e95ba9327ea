"""The disk cache gives back the bytes that were put or none, keeps its limit, and survives killed writers and full disks.

Entries are told apart by their names: the bytes of an entry follow from its data set, its name and its size.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaejob.data import cache as module
from vaejob.data.cache import DiskCache

LIMIT = 10_000
FIT = 9  # entries of 1000 bytes that 15/16 of the limit hold


def content(data_set: str, name: str, size: int = 1000) -> bytes:
    return random.Random(f"{data_set}/{name}/{size}").randbytes(size)


class Checked:
    """A cache whose every answer is compared with what was put."""

    def __init__(self, folder: Path, data_set: str = "aa", *, limit_bytes: int = LIMIT) -> None:
        self.cache = DiskCache(folder, limit_bytes=limit_bytes, data_set=data_set)
        self.data_set = data_set
        self.folder = folder / data_set

    def put(self, *names: str, size: int = 1000) -> None:
        for name in names:
            self.cache.put(name, content(self.data_set, name, size))

    def has(self, name: str, size: int = 1000) -> bool:
        expected = content(self.data_set, name, size)
        found = self.cache.get(name, size=size, crc32=zlib.crc32(expected))
        assert found in (None, expected)
        return found is not None

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))


def names(count: int) -> list[str]:
    return [f"{group:06}-1a2b3c4d" for group in range(count)]


def sizes(folder: Path) -> dict[Path, int]:
    """Of every file in the folder, whoever wrote it."""
    found = {}
    for where, _, files in os.walk(folder):
        for name in files:
            path = Path(where, name)
            try:
                found[path] = path.stat().st_size
            except FileNotFoundError:
                continue
    return found


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def test_what_was_put_comes_back_to_every_process(tmp_path: Path) -> None:
    one, other = Checked(tmp_path / "new" / "folder"), Checked(tmp_path / "new" / "folder")
    assert not one.has("000123-1a2b3c4d")
    one.put("000123-1a2b3c4d")
    assert one.has("000123-1a2b3c4d")
    assert other.has("000123-1a2b3c4d")
    assert (one.cache.hits, one.cache.misses, one.cache.damaged, one.cache.trouble) == (1, 1, 0, None)
    assert not temporaries(tmp_path / "new" / "folder")


def test_only_the_user_may_read_the_cache(tmp_path: Path) -> None:
    Checked(tmp_path / "new").put("a")
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def cut_off(path: Path) -> None:
    os.truncate(path, 999)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    (path / "deep" / "er").mkdir(parents=True)


DAMAGES = [cut_off, lengthen, flip_a_bit, empty, replace_by_a_folder]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_removed_and_put_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = Checked(tmp_path)
    cache.put("a", "b")
    damage(cache.folder / "a")
    assert not cache.has("a")
    assert cache.names() == ["b"]
    assert (cache.cache.hits, cache.cache.misses, cache.cache.damaged) == (0, 1, 1)
    cache.put("a")
    assert cache.has("a")
    assert cache.has("b")
    assert cache.cache.trouble is None


def test_an_entry_that_is_a_folder_is_no_trouble_to_put(tmp_path: Path) -> None:
    cache = Checked(tmp_path)
    (cache.folder / "a").mkdir()
    cache.put("a")
    assert cache.cache.trouble is None
    assert not temporaries(tmp_path)


def test_a_set_that_fits_is_only_hit_on_the_second_pass(tmp_path: Path) -> None:
    """It fits if it fills 15/16 of the limit: here 240 of 256 entries."""
    cache = Checked(tmp_path, limit_bytes=256_000)
    for _ in range(2):
        for name in names(240):
            if not cache.has(name):
                cache.put(name)
    assert (cache.cache.hits, cache.cache.misses) == (240, 240)


def test_of_a_set_twice_the_limit_half_is_hit_on_every_later_pass(tmp_path: Path) -> None:
    """In a new order each time; keeping the latest used instead would hit less and less."""
    cache, rng = Checked(tmp_path, limit_bytes=100_000), random.Random(0)
    for epoch in range(4):
        hits = cache.cache.hits
        for name in rng.sample(names(200), 200):
            if not cache.has(name):
                cache.put(name)
        assert epoch == 0 or cache.cache.hits - hits >= 90


def test_entries_of_the_same_data_set_stay(tmp_path: Path) -> None:
    cache = Checked(tmp_path)
    cache.put(*names(2 * FIT))
    assert cache.names() == names(FIT)


def test_other_data_sets_make_room_longest_unused_first(tmp_path: Path) -> None:
    old, recent, new = Checked(tmp_path, "bb"), Checked(tmp_path, "aa"), Checked(tmp_path, "cc")
    for cache in (recent, old):
        for name in ("3", "2", "1"):
            cache.put(name)
            time.sleep(0.02)  # more than a tick of the file system's clock
    os.utime(old.folder / ".last-use", (0, 0))
    new.put("1", "2", "3")
    kept = []
    for name in ("4", "5", "6", "7", "8", "9", "10"):
        new.put(name)
        assert new.has(name) == (name != "10")
        kept.append("".join(["old ", *old.names(), " recent ", *recent.names()]))
    assert kept == [
        "old 12 recent 123",
        "old 1 recent 123",
        "old  recent 123",
        "old  recent 12",
        "old  recent 1",
        "old  recent ",
        "old  recent ",
    ]


def test_a_data_set_that_is_read_counts_as_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAMP_SECONDS", 0)
    read, idle, new = Checked(tmp_path, "aa"), Checked(tmp_path, "bb"), Checked(tmp_path, "cc")
    read.put(*names(4))
    idle.put(*names(4))
    time.sleep(0.02)
    assert read.has(names(1)[0])
    new.put(*names(FIT - 4))
    assert (len(read.names()), len(idle.names()), len(new.names())) == (4, 0, 5)


def test_an_entry_that_can_never_fit_drives_nothing_out(tmp_path: Path) -> None:
    other, new = Checked(tmp_path, "aa"), Checked(tmp_path, "bb")
    other.put(*names(FIT))
    new.put("a", size=LIMIT)
    new.put("b", size=LIMIT + 1)
    assert other.names() == names(FIT)
    assert new.names() == []
    assert new.cache.trouble is None


def test_others_keep_what_would_not_be_enough(tmp_path: Path) -> None:
    other, new = Checked(tmp_path, "aa"), Checked(tmp_path, "bb")
    other.put("small", size=300)
    new.put(*names(FIT + 1))
    assert new.names() == names(FIT)
    assert other.names() == ["small"]


def test_a_clock_that_was_ahead_does_not_drive_out_our_own(tmp_path: Path) -> None:
    other, own = Checked(tmp_path, "aa"), Checked(tmp_path, "bb")
    other.put(*names(FIT - 1))
    os.utime(other.folder / ".last-use", (time.time() + 3600,) * 2)
    own.put(*names(3))
    assert own.names() == names(3)
    assert len(other.names()) == FIT - 3


@pytest.mark.parametrize("limit_bytes", [0, 1, 999])
def test_a_limit_below_one_entry_keeps_nothing(tmp_path: Path, limit_bytes: int) -> None:
    cache = Checked(tmp_path, limit_bytes=limit_bytes)
    cache.put("a")
    assert not cache.has("a")
    assert sum(sizes(tmp_path).values()) == 0
    assert cache.cache.trouble is None


def test_a_lowered_limit_is_kept(tmp_path: Path) -> None:
    Checked(tmp_path, limit_bytes=10 * LIMIT).put(*names(50))
    Checked(tmp_path).put("one more")
    assert sum(sizes(tmp_path).values()) <= LIMIT


def test_what_is_not_the_caches_own_is_left_alone(tmp_path: Path) -> None:
    """Though the folder's name is hex, and its files fill the limit."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "000000-1a2b3c4d").write_bytes(bytes(LIMIT))
    (tmp_path / "photo.jpg").write_bytes(bytes(LIMIT))
    (tmp_path / ".vaejob-notes").write_bytes(bytes(LIMIT))
    cache = Checked(tmp_path)
    cache.put(*names(2 * FIT))
    assert cache.names() == names(FIT)
    assert [path.stat().st_size for path in (tmp_path / "0" / "000000-1a2b3c4d", tmp_path / "photo.jpg")] == [LIMIT] * 2
    assert (tmp_path / ".vaejob-notes").exists()


def test_an_emptied_cache_fills_again(tmp_path: Path) -> None:
    cache = Checked(tmp_path)
    cache.put(*names(3))
    shutil.rmtree(cache.folder)
    assert not cache.has(names(1)[0])
    cache.put(*names(3))
    assert cache.names() == names(3)


OPERATIONS = st.tuples(
    st.sampled_from(["put", "put", "put", "get", "get", *DAMAGES]),
    st.sampled_from(["aa", "bb", "cc"]),
    st.sampled_from(names(6)),
    st.sampled_from([1000, 1000, 1001, 3000]),
)


@given(st.lists(OPERATIONS, max_size=60), st.sampled_from([0, 1500, 4000, LIMIT, 300_000]))
def test_no_sequence_gives_other_bytes_or_breaks_the_limit(
    operations: list[tuple[str | Callable[[Path], None], str, str, int]], limit_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Checked(Path(folder), name, limit_bytes=limit_bytes) for name in ("aa", "bb", "cc")}
        for operation, data_set, name, size in operations:
            cache = caches[data_set]
            name = f"{name}-{size}"
            if operation == "put":
                cache.put(name, size=size)
                assert limit_bytes < 300_000 or cache.has(name, size)
            elif operation == "get":
                cache.has(name, size)
            elif (cache.folder / name).is_file() and (cache.folder / name).stat().st_size > 998:
                assert callable(operation)
                operation(cache.folder / name)
                assert not cache.has(name, size)
            assert sum(sizes(Path(folder)).values()) <= limit_bytes
            assert not temporaries(Path(folder))
        assert [cache.cache.trouble for cache in caches.values()] == [None] * 3


def test_threads_share_one_cache(tmp_path: Path) -> None:
    cache, gets = Checked(tmp_path, limit_bytes=150_000), 200

    def use(thread: int) -> None:
        rng = random.Random(thread)
        for _ in range(gets):
            name = rng.choice(names(200))
            if not cache.has(name):
                cache.put(name)
            if rng.random() < 0.05:
                (cache.folder / rng.choice(names(200))).write_bytes(b"damage")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert cache.cache.hits + cache.cache.misses == 8 * gets
    assert cache.cache.hits > 0
    assert cache.cache.damaged > 0
    assert cache.cache.trouble is None
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("writers", [1, 4, 16])
def test_the_limit_holds_when_the_others_last_count_is_old(tmp_path: Path, writers: int) -> None:
    """The worst order: each counts while there is room, one fills it, the others write what goes uncounted."""
    limit, size = 2**20, 2**10
    caches = [Checked(tmp_path, limit_bytes=limit) for _ in range(writers)]
    for writer, cache in enumerate(caches):
        cache.put(f"first-{writer}", size=size)
    caches[0].put(*names(limit // size), size=size)
    for writer, cache in enumerate(caches):
        cache.put(*(f"{name}-{writer}" for name in names(50)), size=size)
    filled = sum(sizes(tmp_path).values())
    assert limit * (240 + writers - 1) // 256 <= filled <= limit * (240 + writers) // 256


@contextmanager
def python(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the code; what it does not survive by itself is killed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


FILL = """
import random, sys
from concurrent.futures import ThreadPoolExecutor
from vaejob.data.cache import DiskCache

folder, limit_bytes, data_set, seed, puts = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
cache = DiskCache(folder, limit_bytes=limit_bytes, data_set=data_set)

def fill(thread):
    rng = random.Random(f"{seed} {thread}")
    for number in range(puts):
        size = rng.choice([100, limit_bytes // 300, limit_bytes // 100, limit_bytes // 30])
        cache.put(f"{seed}-{thread}-{number}", bytes(size))

print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(fill, range(4)))
print(cache.trouble)
"""


@pytest.mark.parametrize(("writers", "data_sets"), [(4, 2), (16, 1)])
def test_the_limit_holds_while_processes_with_threads_write(tmp_path: Path, writers: int, data_sets: int) -> None:
    """Names are written once: a file seen before and after a moment was there at that moment."""
    limit, puts, most, seen = 2**21, 1200 // writers, 0, sizes(tmp_path)
    with _all(FILL, *((tmp_path, limit, "abcd"[n % data_sets], n, puts) for n in range(writers))) as processes:
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        while any(process.poll() is None for process in processes):
            before, seen = seen, sizes(tmp_path)
            most = max(most, sum(min(size, seen.get(path, 0)) for path, size in before.items()))
        assert [process.stdout.read() for process in processes if process.stdout] == ["None\n"] * writers
    assert limit * 3 // 4 < most <= limit * (240 + writers) // 256
    assert sum(sizes(tmp_path).values()) <= limit * (240 + writers) // 256
    assert not temporaries(tmp_path)


@contextmanager
def _all(code: str, *arguments: tuple[object, ...]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have all said that they are ready."""
    if not arguments:
        yield []
        return
    with python(code, *arguments[0]) as first, _all(code, *arguments[1:]) as others:
        assert first.stdout
        assert first.stdout.readline() == "ready\n"
        yield [first, *others]


PUT_FOREVER = """
import itertools, random, sys
from vaejob.data.cache import DiskCache

cache, rng = DiskCache(sys.argv[1], limit_bytes=int(sys.argv[2]), data_set="aa"), random.Random(sys.argv[3])
for number in itertools.count():
    size = rng.choice([1000, 20_000, 400_000])
    cache.put(f"{sys.argv[3]}-{number % 5}-{size}", bytes([number % 5]) * size)
    if number == 0:
        print("ready", flush=True)
"""


def test_killed_writers_leave_whole_entries_and_no_pile_of_files(tmp_path: Path) -> None:
    rng, limit, killed = random.Random(0), 2**26, 0
    for round_ in range(7):
        with _all(PUT_FOREVER, *((tmp_path, limit, 3 * round_ + n) for n in range(3))) as processes:
            for process in processes:
                time.sleep(rng.uniform(0, 0.1))
                process.kill()
                killed += 1
        assert len(temporaries(tmp_path)) <= 3  # those of the round before were removed by the first put
    assert killed == 21
    assert_all_whole(tmp_path)
    Checked(tmp_path, limit_bytes=limit).put("one more")
    assert not temporaries(tmp_path)


def assert_all_whole(folder: Path) -> None:
    cache = DiskCache(folder, limit_bytes=0, data_set="aa")
    entries = [path.name for path in (folder / "aa").iterdir() if not path.name.startswith(".")]
    assert len(entries) > 100
    for name in entries:
        _, number, size = map(int, name.split("-"))
        expected = bytes([number]) * size
        assert cache.get(name, size=size, crc32=zlib.crc32(expected)) == expected


SIGNAL_BEFORE_RENAME = """
import os, sys
from pathlib import Path
from vaejob.data.cache import DiskCache

rename = Path.replace
def replace(self, target):
    os.kill(os.getpid(), int(sys.argv[2]))
    return rename(self, target)

Path.replace = replace
cache = DiskCache(sys.argv[1], limit_bytes=10_000, data_set="aa")
cache.put("unfinished", bytes(4000))
print(cache.trouble)
"""


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    with python(SIGNAL_BEFORE_RENAME, tmp_path, int(signal.SIGKILL)) as process:
        process.wait()
    assert [path.stat().st_size for path in temporaries(tmp_path)] == [4000]
    cache = Checked(tmp_path)
    cache.put(*names(FIT))
    assert cache.names() == names(FIT)
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("hours", [0, 2])
def test_what_is_being_written_counts_for_an_hour(tmp_path: Path, hours: int) -> None:
    """Of a live process too: its number may be another's by now. It loses one entry, and has no trouble."""
    with python(SIGNAL_BEFORE_RENAME, tmp_path, int(signal.SIGSTOP)) as process:
        os.waitpid(process.pid, os.WUNTRACED)
        (written,) = temporaries(tmp_path)
        assert written.stat().st_size == 4000
        os.utime(written, (time.time() - 3600 * hours,) * 2)
        cache = Checked(tmp_path)
        cache.put(*names(FIT))
        assert written.exists() == (hours == 0)
        assert len(cache.names()) == (5 if hours == 0 else FIT)
        process.send_signal(signal.SIGCONT)
        assert process.stdout
        assert process.stdout.read() == "None\n"
    assert (cache.folder / "unfinished").exists() == (hours == 0)
    assert not temporaries(tmp_path)


def test_a_leftover_of_another_host_stays_for_an_hour(tmp_path: Path) -> None:
    with python(SIGNAL_BEFORE_RENAME, tmp_path, int(signal.SIGKILL)) as process:
        process.wait()
    (left,) = temporaries(tmp_path)
    elsewhere = left.rename(f"{left}-elsewhere")
    cache = Checked(tmp_path)
    cache.put("a")
    assert elsewhere.exists()
    os.utime(elsewhere, (time.time() - 3601,) * 2)
    cache.put("b")
    assert not elsewhere.exists()


def a_file(folder: Path) -> None:
    folder.write_bytes(b"")


def below_a_file(folder: Path) -> None:
    folder.parent.rmdir()
    folder.parent.write_bytes(b"")


def data_set_is_a_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "aa").write_bytes(b"")


@pytest.mark.parametrize("spoil", [a_file, below_a_file, data_set_is_a_file])
def test_a_folder_that_cannot_be_is_named_and_all_goes_on(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    (tmp_path / "above").mkdir()
    folder = tmp_path / "above" / "cache"
    spoil(folder)
    cache = Checked(folder)
    cache.put("a")
    assert not cache.has("a")
    assert cache.cache.trouble == f"{folder}: nothing more is cached there (a file is where a folder must be)"
    assert (cache.cache.misses, cache.cache.damaged) == (1, 0)


def test_a_folder_that_vanishes_is_named_once(tmp_path: Path) -> None:
    cache = Checked(tmp_path / "cache")
    cache.put("a")
    shutil.rmtree(tmp_path / "cache")
    assert not cache.has("a")
    assert cache.cache.trouble is None
    cache.put("a")
    expected = f"{tmp_path / 'cache'}: nothing more is cached there (No such file or directory)"
    assert cache.cache.trouble == expected
    (tmp_path / "cache").write_bytes(b"")
    cache.put("b")
    assert not cache.has("b")
    assert cache.cache.trouble == expected


PUT_TWICE = """
import os, resource, subprocess, sys, zlib
from vaejob.data.cache import DiskCache

folder, spoil = sys.argv[1:]
if spoil != "files of 50 kB":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", folder], check=True)
cache = DiskCache(folder, limit_bytes=10**7, data_set="aa")
cache.put("small", bytes(1000))
if spoil == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
if spoil == "files of 50 kB":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
cache.put("large", bytes(300_000))
cache.put("small too", bytes(1000))
print(cache.trouble)
assert cache.get("small", size=1000, crc32=zlib.crc32(bytes(1000))) == bytes(1000)
print(os.listdir(folder), sorted(os.listdir(folder + "/aa")))
"""


def may_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("files of 50 kB", "File too large"),
        ("full", "No space left on device"),
        ("read-only", "Read-only file system"),
    ],
)
def test_a_disk_that_takes_no_more_is_named_and_still_read(tmp_path: Path, spoil: str, reason: str) -> None:
    """On a small disk of the process's own, where the user may mount one."""
    own_mounts = [] if spoil == "files of 50 kB" else ["unshare", "--mount"]
    if own_mounts and not may_mount():
        pytest.skip("only root may mount a small disk")
    command = [*own_mounts, sys.executable, "-c", PUT_TWICE, str(tmp_path), spoil]
    trouble, found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert trouble == f"{tmp_path}: nothing more is cached there ({reason})"
    assert found == "['aa'] ['.last-use', 'small']"
