"""The disk cache: whole entries or none, from nobody but the user, and never in the way."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import stat
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from flashmla_cupy.build import cache_folder, cubin_cache
from flashmla_cupy.errors import KernelCacheError, KernelCacheWarning

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the cache needs a POSIX system")

KEY = "a5" * 32
OTHER_KEY = "5a" * 32
METADATA = {"name": "schedule", "seconds": 0.25, "log": "µ"}
CUBIN = bytes(range(256))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that does not exist yet, below one that is closed to others."""
    tmp_path.chmod(0o700)
    path = tmp_path / "home" / "cache"
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", str(path))
    monkeypatch.setattr(cache_folder, "_warned", set())
    return path


@pytest.fixture
def entry(folder: Path) -> Path:
    """The file of one stored entry."""
    path = cubin_cache.store(KEY, METADATA, CUBIN)
    assert path is not None
    return Path(path)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---- store, load, list, clear ----------------------------------------------------------------


def test_round_trip(folder):
    assert cubin_cache.load(KEY) is None
    assert not folder.exists()  # looking leaves no trace
    assert cubin_cache.store(KEY, METADATA, CUBIN) == str(folder / f"{KEY}.cubin")
    assert cubin_cache.load(KEY) == (KEY, METADATA, CUBIN)
    assert cubin_cache.load(OTHER_KEY) is None
    cubin_cache.store(KEY, METADATA, b"newer")
    assert cubin_cache.load(KEY) == (KEY, METADATA, b"newer")
    assert names(folder) == [f"{KEY}.cubin"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_may_enter(folder, umask):
    before = os.umask(umask)
    try:
        path = cubin_cache.store(KEY, METADATA, CUBIN)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(os.stat(p).st_mode) for p in (folder.parent, folder, path)]
    assert modes == [0o700, 0o700, 0o600]
    assert cubin_cache.load(KEY) is not None


def test_entries_and_clear(folder, entry):
    cubin_cache.store(OTHER_KEY, METADATA, CUBIN)
    size = 2 * entry.stat().st_size + 4
    (folder / f".{KEY}.{'0' * 16}.tmp").write_bytes(b"1234")
    (folder / "notes.txt").write_text("mine")
    (folder / f"{'b' * 64}.cubin").mkdir()  # one entry that cannot be used hides no other
    with pytest.warns(KernelCacheWarning):
        assert [found.key for found in cubin_cache.entries()] == [OTHER_KEY, KEY]
    with pytest.warns(RuntimeWarning, match="clear"):
        assert cubin_cache.clear() == (3, size)
    assert names(folder) == [f"{'b' * 64}.cubin", "notes.txt"]
    (folder / f"{'b' * 64}.cubin").rmdir()
    assert cubin_cache.clear() == (0, 0)


def test_clear_leaves_what_only_has_such_a_name(folder, entry):
    """Other programs name files after a SHA-256 as well. What is damaged behind its beginning, or
    of another version, is ours."""
    theirs = folder / f"{OTHER_KEY}.cubin"
    theirs.write_bytes(b"\x7fELF" + CUBIN)
    (folder / f"{'b' * 64}.cubin").write_bytes(b"")
    old = bytearray(entry.read_bytes())
    old[8] += 1
    (folder / f"{'c' * 64}.cubin").write_bytes(old[:-1])
    assert cubin_cache.require_usable() == 2
    files, _ = cubin_cache.clear()
    assert files == 2
    assert names(folder) == sorted([theirs.name, f"{'b' * 64}.cubin"])
    assert cubin_cache.require_usable() == 0


def test_clear_without_a_directory(folder):
    assert cubin_cache.clear() == (0, 0)
    assert not folder.exists()


# ---- where -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FLASHMLA_CUPY_CACHE_DIR": "/x/y", "XDG_CACHE_HOME": "/z"}, "/x/y"),
        ({"FLASHMLA_CUPY_CACHE_DIR": "/x//y/"}, "/x/y"),
        ({"XDG_CACHE_HOME": "/z"}, "/z/flashmla_cupy"),
        ({"XDG_CACHE_HOME": ""}, "/h/.cache/flashmla_cupy"),
        ({"XDG_CACHE_HOME": "relative"}, "/h/.cache/flashmla_cupy"),
        ({}, "/h/.cache/flashmla_cupy"),
    ],
)
def test_directory(monkeypatch, environment, expected):
    for variable in ("FLASHMLA_CUPY_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"HOME": "/h", **environment}.items():
        monkeypatch.setenv(variable, value)
    assert cubin_cache.directory() == expected


@pytest.mark.parametrize("value", ["", "cache", "./cache", "~/cache", "/", "//"])
def test_variable_must_be_an_absolute_path(monkeypatch, value):
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", value)
    with pytest.raises(KernelCacheError, match="FLASHMLA_CUPY_CACHE_DIR: expected"):
        cubin_cache.load(KEY)


def test_variable_must_not_name_a_file(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(KernelCacheError, match="is a file"):
        cubin_cache.store(KEY, METADATA, CUBIN)


# ---- damage ----------------------------------------------------------------------------------


def test_every_truncation_is_refused(entry):
    whole = entry.read_bytes()
    for length in range(len(whole)):
        entry.write_bytes(whole[:length])
        assert cubin_cache.load(KEY) is None, length
        assert not entry.exists(), length
    entry.write_bytes(whole)
    assert cubin_cache.load(KEY) == (KEY, METADATA, CUBIN)


def test_every_flipped_byte_is_refused(entry):
    whole = entry.read_bytes()
    chance = random.Random(0)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= chance.randrange(1, 256)
        entry.write_bytes(flipped)
        assert cubin_cache.load(KEY) is None, position
        assert not entry.exists(), position


def test_moved_boundary_is_refused(entry):
    """Lengths that still add up, with a byte of the cubin counted as metadata."""
    whole = bytearray(entry.read_bytes())
    whole[12] += 1
    whole[16:24] = (int.from_bytes(whole[16:24], "little") - 1).to_bytes(8, "little")
    entry.write_bytes(whole)
    assert cubin_cache.load(KEY) is None


def test_longer_file_is_refused(entry):
    entry.write_bytes(entry.read_bytes() + b"\0")
    assert cubin_cache.load(KEY) is None


def test_entry_under_another_key_is_refused(entry):
    shutil.copy(entry, entry.with_name(f"{OTHER_KEY}.cubin"))
    assert cubin_cache.load(OTHER_KEY) is None
    assert cubin_cache.load(KEY) is not None


def test_huge_file_is_not_read(entry):
    os.truncate(entry, 1 << 40)  # sparse; reading it would exhaust the memory
    assert cubin_cache.load(KEY) is None


# ---- trust -----------------------------------------------------------------------------------


def group_writable_directory(entry):
    entry.parent.chmod(0o770)


def world_writable_directory(entry):
    entry.parent.chmod(0o777)


def sticky_world_writable_directory(entry):
    entry.parent.chmod(0o1777)


def world_writable_parent(entry):
    entry.parent.parent.chmod(0o777)


def group_writable_parent(entry):
    entry.parent.parent.chmod(0o770)


def symbolic_link_as_directory(entry):
    elsewhere = entry.parent.with_name("elsewhere")
    entry.parent.rename(elsewhere)
    entry.parent.symlink_to(elsewhere)


def parent_linked_into_an_open_directory(entry):
    home = entry.parent.parent
    elsewhere = home.with_name("open") / "home"
    elsewhere.parent.mkdir()
    home.rename(elsewhere)
    home.symlink_to(elsewhere)
    elsewhere.parent.chmod(0o777)


def symbolic_link_as_entry(entry):
    target = entry.parent.with_name("target")
    entry.rename(target)
    entry.symlink_to(target)


def hard_link_as_entry(entry):
    os.link(entry, entry.parent.with_name("second_name"))


def fifo_as_entry(entry):
    entry.unlink()
    os.mkfifo(entry)


def socket_as_entry(entry):
    entry.unlink()
    place = os.getcwd()
    os.chdir(entry.parent)  # a socket's path is at most 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(entry.name[:64])
        os.rename(entry.name[:64], entry.name)
    finally:
        os.chdir(place)


def directory_as_entry(entry):
    entry.unlink()
    entry.mkdir()


def group_writable_entry(entry):
    entry.chmod(0o620)


def world_writable_entry(entry):
    entry.chmod(0o602)


def other_owner_of_entry(entry):
    os.chown(entry, 12345, -1)


def other_owner_of_directory(entry):
    os.chown(entry.parent, 12345, -1)


def other_owner_of_parent(entry):
    os.chown(entry.parent.parent, 12345, -1)


PLANTED = [
    group_writable_directory,
    world_writable_directory,
    sticky_world_writable_directory,
    world_writable_parent,
    group_writable_parent,
    symbolic_link_as_directory,
    parent_linked_into_an_open_directory,
    symbolic_link_as_entry,
    hard_link_as_entry,
    fifo_as_entry,
    socket_as_entry,
    directory_as_entry,
    group_writable_entry,
    world_writable_entry,
    other_owner_of_entry,
    other_owner_of_directory,
    other_owner_of_parent,
]


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_situation_is_refused(entry, plant):
    if plant.__name__.startswith("other_owner") and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    plant(entry)
    with pytest.warns(KernelCacheWarning, match="Kernels are compiled in memory") as caught:
        assert cubin_cache.load(KEY) is None
        assert cubin_cache.load(KEY) is None
    assert len(caught) == 1  # said once a process


@pytest.mark.parametrize("plant", [plant for plant in PLANTED if "entry" not in plant.__name__])
def test_nothing_is_written_to_an_untrusted_directory(entry, plant):
    if plant.__name__.startswith("other_owner") and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    plant(entry)
    with pytest.warns(KernelCacheWarning):
        assert cubin_cache.store(OTHER_KEY, METADATA, CUBIN) is None
        assert cubin_cache.clear() == (0, 0)
    assert names(entry.parent) == [entry.name]


def test_nothing_is_created_below_an_open_directory(folder, tmp_path):
    tmp_path.chmod(0o777)
    with pytest.warns(KernelCacheWarning, match="chmod go-w"):
        assert cubin_cache.store(KEY, METADATA, CUBIN) is None
    assert names(tmp_path) == []


def test_symbolic_link_is_replaced_and_its_target_untouched(entry):
    target = entry.parent.with_name("target")
    target.write_bytes(b"precious")
    entry.unlink()
    entry.symlink_to(target)
    assert cubin_cache.store(KEY, METADATA, CUBIN) is not None
    assert target.read_bytes() == b"precious"
    assert cubin_cache.load(KEY) is not None


def link_of_our_own_above(entry):
    home = entry.parent.parent
    home.rename(home.with_name("moved"))
    home.symlink_to("moved/../moved")


def sticky_parent(entry):
    entry.parent.parent.chmod(0o1777)


@pytest.mark.parametrize("arrange", [link_of_our_own_above, sticky_parent])
def test_legitimate_situation_is_accepted(entry, arrange):
    arrange(entry)
    assert cubin_cache.load(KEY) == (KEY, METADATA, CUBIN)
    assert cubin_cache.store(OTHER_KEY, METADATA, CUBIN) is not None


def test_cache_filled_by_root_needs_the_variable(entry, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can fill a cache as root")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert cubin_cache.load(KEY) is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(entry.parent.parent))
    entry.parent.rename(entry.parent.with_name("flashmla_cupy"))
    monkeypatch.delenv("FLASHMLA_CUPY_CACHE_DIR")
    with pytest.warns(KernelCacheWarning):
        assert cubin_cache.load(KEY) is None


def test_entries_are_as_readable_as_their_directory(folder):
    """A directory that an administrator made for all serves all."""
    folder.mkdir(parents=True)
    for mode, expected in ((0o755, 0o644), (0o750, 0o640), (0o700, 0o600)):
        folder.chmod(mode)
        path = cubin_cache.store(KEY, METADATA, CUBIN)
        assert stat.S_IMODE(os.stat(path).st_mode) == expected


def test_a_cache_that_root_filled_serves_other_users(folder, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    # Every directory above it must let other users pass; pytest's own do not.
    top = Path(tempfile.mkdtemp(dir="/var"))
    try:
        top.chmod(0o755)
        (top / "kernels").mkdir(mode=0o755)
        monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", str(top / "kernels"))
        cubin_cache.store(KEY, METADATA, CUBIN)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(65534)
                status = 0 if cubin_cache.load(KEY) == (KEY, METADATA, CUBIN) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize(
    ("step", "owner", "temporary", "remedy"),
    [
        ("/home/me/open", 12345, "/tmp", "chmod go-w /home/me/open"),
        ("/home/me/my open", 12345, "/tmp", "chmod go-w '/home/me/my open'"),
        ("/scratch/shared", 0, "/tmp", "FLASHMLA_CUPY_CACHE_DIR"),
        ("/tmp", 12345, "/tmp", "FLASHMLA_CUPY_CACHE_DIR"),
        ("/data", 12345, "/tmp", "FLASHMLA_CUPY_CACHE_DIR"),
        ("/home/me/tmp", 12345, "/home/me/tmp", "FLASHMLA_CUPY_CACHE_DIR"),
    ],
)
def test_nobody_is_told_to_close_a_shared_directory(monkeypatch, step, owner, temporary, remedy):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: temporary)
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    status = os.stat_result((0o40777, 0, 0, 0, owner, 0, 0, 0, 0, 0))
    said = cache_folder._remedy(step, status)
    assert remedy in said
    assert ("chmod" in said) == ("chmod" in remedy)


# ---- failures of the file system -------------------------------------------------------------


def test_a_cubin_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    """After a crash of the machine the name stands for all of it or for nothing."""
    done = []
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace")}

    def noting(name):
        def call(*args, **kwargs):
            what = "file" if name == "replace" or stat.S_ISREG(os.fstat(args[0]).st_mode) else "dir"
            done.append((name, what))
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, noting(name))
    assert cubin_cache.store(KEY, METADATA, CUBIN)
    assert done == [("write", "file"), ("fsync", "file"), ("replace", "file"), ("fsync", "dir")]


def below_a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path / "link" / "cache"


def in_proc(tmp_path):
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc on this system")
    return Path("/proc/flashmla_cupy")


@pytest.mark.parametrize("place", [below_a_dangling_link, in_proc])
def test_a_place_where_nothing_can_be_made_is_reported(folder, tmp_path, monkeypatch, place):
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", str(place(tmp_path)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # looking is no failure: nothing is stored there yet
        assert cubin_cache.load(KEY) is None
    with pytest.warns(RuntimeWarning, match="Cannot write the kernel cache: .*No such file"):
        assert cubin_cache.store(KEY, METADATA, CUBIN) is None


def test_a_cache_that_is_cleared_meanwhile_is_no_failure(folder, monkeypatch):
    real = os.replace

    def cleared(*args, **kwargs):
        cubin_cache.clear()
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "replace", cleared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cubin_cache.store(KEY, METADATA, CUBIN) is None
    assert names(folder) == []


def test_parent_that_is_a_file(folder):
    folder.parent.touch()
    with pytest.warns(RuntimeWarning, match="Cannot write the kernel cache") as caught:
        assert cubin_cache.store(KEY, METADATA, CUBIN) is None
        assert cubin_cache.store(KEY, METADATA, CUBIN) is None
    assert len(caught) == 1


def test_no_home(folder, monkeypatch):
    monkeypatch.delenv("FLASHMLA_CUPY_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(RuntimeWarning, match="no home directory"):
        assert cubin_cache.load(KEY) is None


CALLS = ("open", "mkdir", "lstat", "fstat", "write", "fsync", "close", "replace", "listdir")


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE],
    ids=lambda number: errno.errorcode[number],
)
@pytest.mark.parametrize("call", CALLS)
def test_any_failing_call_leaves_no_damage(folder, monkeypatch, call, number):
    """The first, second, ... use of a call fails; the cache then says no, and never raises."""
    real = getattr(os, call)
    failures = 0
    for nth in range(12):
        uses = 0

        def failing(*args, nth=nth, **kwargs):
            nonlocal uses, failures
            uses += 1
            if uses == nth + 1:
                failures += 1
                if call == "close":
                    real(*args, **kwargs)  # an error of close reports an earlier one
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        shutil.rmtree(folder.parent, ignore_errors=True)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            patch.setattr(cubin_cache.os, call, failing)
            cubin_cache.store(KEY, METADATA, CUBIN)
            found = cubin_cache.load(KEY)
        assert found in (None, (KEY, METADATA, CUBIN))
        assert not list(folder.glob(".*.tmp"))
    assert failures


# ---- killed writers --------------------------------------------------------------------------


def test_killed_writers_leave_whole_entries(folder):
    """kill -9 at a random moment of a writer that replaces one entry over and over."""
    versions = {size: bytes([size % 251]) * size for size in (300_000, 500_000)}
    chance = random.Random(1)
    cubin_cache.store(KEY, METADATA, versions[300_000])
    for _ in range(60):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
            child = os.fork()
        if child == 0:
            try:
                while True:
                    for cubin in versions.values():
                        cubin_cache.store(KEY, METADATA, cubin)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.001, 0.012))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = cubin_cache.load(KEY)
        assert found is not None and found.cubin == versions[len(found.cubin)]
    temporary = [name for name in names(folder) if name.endswith(".tmp")]
    assert 0 < len(temporary) <= 60  # 0: no kill hit a writer, so nothing was tested
    old = time.time() - cubin_cache.STALE_SECONDS - 1
    for name in temporary[1:]:
        os.utime(folder / name, (old, old))
    cubin_cache.store(OTHER_KEY, METADATA, CUBIN)
    assert names(folder) == sorted([temporary[0], f"{KEY}.cubin", f"{OTHER_KEY}.cubin"])
