"""Building with ninja, on a library of two files: what is made again, what is never linked, what is said when it fails."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowkernels.backends import native
from lowkernels.backends.native import BuildError, Link, Unit

SOURCES = {
    "one.cpp": '#include "shared.h"\nextern "C" int one() { return SHARED + 1; }\n',
    "two.cpp": 'extern "C" int two() { return 2; }\n',
    "shared.h": "#define SHARED 10\n",
}
ALL = ["one.o", "two.o", "library.so"]


class Toy:
    """A folder of sources, and the library of it."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.sources = folder / "toy"
        self.sources.mkdir()
        self.output = folder / "out" / "toy.so"
        self.objects = folder / "objects"
        self._caplog = caplog
        for name, text in SOURCES.items():
            (self.sources / name).write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        """An edit that is older than everything else by its time, as that of a file that was unpacked is."""
        path = self.sources / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        os.utime(path, (0, 0))

    def build(self, compiler: str = "g++", depends_on: object = None, objects: bool = True) -> list[str]:
        """Build; the files that were made, in the order in which the steps ended."""
        native.digest.cache_clear()
        units = [Unit(name, f"{name}.cpp", (compiler, "-fPIC", "-Wall")) for name in ("one", "two")]
        self._caplog.clear()
        with self._caplog.at_level(logging.INFO, "lowkernels"):
            native.build_library(
                self.output,
                self.sources,
                units,
                Link((compiler, "-shared"), ()),
                objects=self.objects if objects else None,
                depends_on=depends_on,
            )
        steps = [record.getMessage().split(": ", 1) for record in self._caplog.records]
        assert [step for step, _ in steps] == [f"step {n} of {len(steps)}" for n in range(1, len(steps) + 1)]
        return [what.split(" from ")[0] for _, what in steps]

    def values(self) -> tuple[int, int]:
        """What the functions of the library return. A process loads a file of one name once."""
        copy = self.output.with_name(f"{len(list(self.output.parent.iterdir()))}.so")
        shutil.copy(self.output, copy)
        loaded = ctypes.CDLL(str(copy))
        return loaded.one(), loaded.two()


@pytest.fixture
def toy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Toy:
    if native.ninja() is None or shutil.which("g++") is None:
        pytest.skip("needs ninja and g++")
    return Toy(tmp_path, caplog)


def script(path: Path, text: str) -> str:
    """A compiler: `text` first, then g++."""
    path.write_text(f'#!/bin/sh\n{text}\nexec g++ "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_only_what_changed_is_made_again(toy: Toy) -> None:
    assert sorted(toy.build()) == sorted(ALL)
    assert toy.values() == (11, 2)
    assert toy.build() == []
    toy.edit("two.cpp", "return 2", "return 3")
    assert toy.build() == ["two.o", "library.so"]
    assert toy.values() == (11, 3)


def test_edited_header_makes_its_users_again(toy: Toy) -> None:
    toy.build()
    toy.edit("shared.h", "10", "20")
    assert toy.build() == ["one.o", "library.so"]
    assert toy.values() == (21, 2)


def test_removed_header_is_not_found(toy: Toy) -> None:
    toy.build()
    (toy.sources / "shared.h").unlink()
    with pytest.raises(BuildError, match=r"shared\.h"):
        toy.build()


def test_what_objects_depend_on_has_a_folder_of_its_own(toy: Toy) -> None:
    assert sorted(toy.build(depends_on=("-O1", "2.10"))) == sorted(ALL)
    assert sorted(toy.build(depends_on=("-O1", "2.11"))) == sorted(ALL)
    assert toy.build(depends_on=("-O1", "2.10")) == []


def folders(toy: Toy) -> list[str]:
    return sorted(path.name for path in toy.objects.iterdir())


def test_folders_used_long_ago_are_removed(toy: Toy) -> None:
    for number in range(native.FOLDERS_KEPT):
        toy.build(depends_on=number)
    assert toy.build(depends_on=0) == []
    others = ["other-0123456789abcdef0123", "toy-notes", ".removed-toy-0123456789abcdef0123-1"]
    for name in others:
        (toy.objects / name).mkdir()
    for number in range(native.FOLDERS_KEPT, native.FOLDERS_KEPT + 2):
        toy.build(depends_on=number)
    assert len(folders(toy)) == native.FOLDERS_KEPT + 2
    assert set(others[:2]) <= set(folders(toy))
    for number in (0, *range(3, native.FOLDERS_KEPT + 2)):
        assert toy.build(depends_on=number) == [], "is still there"
    assert sorted(toy.build(depends_on=1)) == sorted(ALL), "was removed"


def test_folders_in_use_are_not_removed(toy: Toy) -> None:
    toy.build(depends_on="in use")
    (name,) = folders(toy)
    with native._locked(toy.objects / name / ".lock"):
        for number in range(native.FOLDERS_KEPT + 1):
            toy.build(depends_on=number)
        assert name in folders(toy)
    toy.build(depends_on=number)
    assert name not in folders(toy)
    assert len(folders(toy)) == native.FOLDERS_KEPT


def test_who_waited_for_a_folder_that_was_removed_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ".lock"
    waiting, done = threading.Event(), threading.Event()
    locked = []

    def wait() -> None:
        waiting.set()
        with native._locked(path) as lock:
            locked.append(os.path.samestat(os.fstat(lock), path.stat()))
            done.wait()

    thread = threading.Thread(target=wait)
    with native._locked(path):
        thread.start()
        waiting.wait()
        time.sleep(0.3)  # in which it comes to wait
        assert not locked
        path.parent.rename(tmp_path / "removed")
    wait_for(lambda: bool(locked) or not thread.is_alive())
    with pytest.raises(BlockingIOError), native._locked(path, wait=False):
        pass
    done.set()
    thread.join()
    assert locked == [True]


def test_other_flags_make_all_again(toy: Toy, tmp_path: Path) -> None:
    toy.build()
    assert sorted(toy.build(compiler=script(tmp_path / "other g++", ""))) == sorted(ALL)
    assert toy.values() == (11, 2)


def test_objects_are_not_kept_unasked(toy: Toy) -> None:
    toy.build(objects=False)
    assert toy.values() == (11, 2)
    assert not toy.objects.exists()
    assert all(path.suffix == ".so" for path in toy.output.parent.iterdir())


def test_error_names_the_file_and_what_the_compiler_says(toy: Toy) -> None:
    toy.build()
    toy.edit("two.cpp", "return 2", "return undefined_name")
    with pytest.raises(BuildError, match=r"csrc/toy/two\.cpp:1:\d+: error: .*undefined_name.* was not declared"):
        toy.build()
    assert toy.values() == (11, 2), "the library before stays"
    toy.edit("two.cpp", "undefined_name", "4")
    assert "two.o" in toy.build()
    assert toy.values() == (11, 4)


def test_long_errors_are_cut(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"message 1\n(.|\n)*\.\.\. and \d+ more lines$") as caught:
        toy.build(script(tmp_path / "compiler", "for i in $(seq 500); do echo message $i; done; exit 1"))
    assert len(str(caught.value).splitlines()) < 50


def test_sources_that_change_meanwhile_are_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.build()
    assert native.digest(toy.sources)
    monkeypatch.setattr(native.digest, "cache_clear", lambda: None, raising=False)
    toy.edit("two.cpp", "2", "3")
    with pytest.raises(BuildError, match="toy has changed since this process first looked at it"):
        toy.build()


def test_no_ninja_is_said(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"neither installed \(pip install ninja\) nor on PATH"):
        toy.build()


def test_ninja_of_the_package_or_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ninja_in(name: str) -> Path:
        (tmp_path / name).mkdir()
        path = tmp_path / name / "ninja"
        path.write_text("")
        path.chmod(0o755)
        return path

    of_package, on_path = ninja_in("package"), ninja_in("path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    for folder, expected in ((str(of_package.parent), of_package), ("", on_path), (str(tmp_path / "gone"), on_path)):
        monkeypatch.setitem(sys.modules, "ninja", type(sys)("ninja"))
        monkeypatch.setattr(sys.modules["ninja"], "BIN_DIR", folder, raising=False)
        assert native.ninja() == str(expected)
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert native.ninja() == str(on_path)


@pytest.mark.parametrize(("jobs", "meet"), [("1", False), ("2", True)])
def test_max_jobs(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str, meet: bool) -> None:
    monkeypatch.setenv(native.JOBS_VARIABLE, jobs)
    if meet:  # each waits for the other
        waits = f"touch {tmp_path}/$$.here; until [ $(ls {tmp_path} | grep -c here) = 2 ]; do sleep 0.01; done"
        text = f'case "$*" in *-shared*) ;; *) {waits};; esac'
    else:  # a second one would find the folder of the first
        text = f"mkdir {tmp_path}/running || exit 1; trap 'rmdir {tmp_path}/running' EXIT; g++ \"$@\"; exit"
    assert sorted(toy.build(script(tmp_path / "compiler", text))) == sorted(ALL)


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_max_jobs_that_is_no_number(toy: Toy, monkeypatch: pytest.MonkeyPatch, jobs: str) -> None:
    monkeypatch.setenv(native.JOBS_VARIABLE, jobs)
    with pytest.raises(BuildError, match=f"MAX_JOBS is '{jobs}'; allowed are whole numbers of 1 or more"):
        toy.build()


def test_disk_that_is_full(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.build()
    toy.edit("two.cpp", "2", "3")

    def fill(source: Path, target: Path) -> None:
        target.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(native.shutil, "copy", fill)
        with pytest.raises(BuildError, match=r"could not be built: .*No space left"):
            toy.build()
    assert [path.name for path in toy.output.parent.iterdir()] == ["toy.so"]
    assert toy.values() == (11, 2)


def test_folder_that_cannot_be_written_to(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for attribute in ("objects", "output"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toy, attribute, tmp_path / "file" / "folder" / "x.so")
            with pytest.raises(BuildError, match=r"could not be built: .*Not a directory"):
                toy.build()


KILLED = """
import sys
from pathlib import Path
from lowkernels.backends import native
folder, compiler = Path(sys.argv[1]), sys.argv[2]
units = [native.Unit(name, f"{name}.cpp", (compiler, "-fPIC", "-Wall")) for name in ("one", "two")]
link = native.Link((compiler, "-shared"), ())
(folder / "builds").touch()
native.build_library(folder / "out/toy.so", folder / "toy", units, link, objects=folder / "objects", depends_on=None)
"""


def wait_for(what: Callable[[], bool]) -> None:
    while not what():
        time.sleep(0.01)


def test_killed_build_goes_on_once_its_compilers_are_gone(toy: Toy, tmp_path: Path) -> None:
    # The first compiler waits, half of its output written. Any other that comes meanwhile says so.
    waits = f"""case "$*" in *-shared*) exec g++ "$@";; esac
for last; do out=$last; done
if mkdir {tmp_path}/first 2>/dev/null; then
  echo "half an object" > $out; touch {tmp_path}/started; until [ -e {tmp_path}/go ]; do sleep 0.01; done; touch {tmp_path}/over
elif [ ! -e {tmp_path}/over ]; then
  touch {tmp_path}/overlap
fi"""
    compiler = script(tmp_path / "compiler", waits)
    environment = {**os.environ, native.JOBS_VARIABLE: "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), compiler]
    first = subprocess.Popen(command, env=environment)
    wait_for(lambda: (tmp_path / "started").exists() or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (tmp_path / "builds").unlink()
    second = subprocess.Popen(command, env=environment)
    wait_for(lambda: (tmp_path / "builds").exists() or second.poll() is not None)
    time.sleep(0.5)  # in which it does nothing
    (tmp_path / "go").touch()
    assert second.wait(timeout=120) == 0
    assert not (tmp_path / "overlap").exists()
    assert toy.values() == (11, 2)
