"""The lock files agree with pyproject.toml, pin every dependency, and carry a hash for each file;
the floors have no known holes.
"""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINUX = {
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "python_version": "3.11",
    "python_full_version": "3.11.7",
    "extra": "",
}
LINUX |= {
    "os_name": "posix",
    "platform_system": "Linux",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


def wanted() -> list[Requirement]:
    listed = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["book"],
        *PROJECT["optional-dependencies"]["test"],
    ]
    return [
        need
        for need in map(Requirement, listed)
        if need.name != "irann" and (not need.marker or need.marker.evaluate(LINUX))
    ]


def read(name: str) -> dict[str, tuple[Version, list[str]]]:
    """-> name: version and hashes; an unexpected line fails."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "book" / name).read_text())
    line = re.compile(r"(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
    assert not line.sub("", text), "only NAME==VERSION with hashes"
    return {
        name: (Version(version), re.findall(r"[0-9a-f]{64}", hashes))
        for name, version, hashes in line.findall(text)
    }


LOCK, CUDA = read("lock.txt"), read("lock-cuda.txt")


@pytest.mark.parametrize("need", wanted(), ids=lambda need: need.name)
def test_the_lock_is_within_the_ranges_of_the_project(need):
    version, hashes = LOCK[canonicalize_name(need.name)]
    assert version in need.specifier and hashes


def test_what_the_locked_releases_need_is_locked_too():
    """Seen through the metadata of what is installed here, wherever that is the locked release."""
    todo, seen = [canonicalize_name(need.name) for need in wanted()], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        assert name in LOCK, name
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(Version(installed.version).public) != LOCK[name][0]:
            continue
        for need in map(Requirement, installed.requires or ()):
            if not need.marker or need.marker.evaluate(LINUX):
                inner = canonicalize_name(need.name)
                assert inner in LOCK | CUDA, f"{name} needs {inner}"
                assert (LOCK | CUDA)[inner][0] in need.specifier, f"{name} needs {need}"
                todo += [inner] * (inner in LOCK)


def test_names_are_locked_once_and_no_address_is_written_down():
    assert not LOCK.keys() & CUDA.keys() and all(
        name == canonicalize_name(name) for name in LOCK | CUDA
    )
    assert all(re.match("nvidia-|cuda-", name) for name in CUDA)
    for name in ("lock.txt", "lock-cuda.txt"):
        assert "//" not in (ROOT / "book" / name).read_text()
    assert len(LOCK["torch"][1]) == 2  # the build for GPUs and the one for CPUs


@pytest.mark.parametrize(
    "name, hole",
    [
        (
            "torch",
            "2.9.1",
        ),  # CVE-2026-24747, in the loading of pickles, which this project never does
        ("safetensors", "0.7.0"),
        ("filelock", "3.20.2"),  # CVE-2025-68146: it follows a link put in the lock's place
        ("numpy", "1.26.4"),
    ],
)
def test_floors(name, hole):
    (need,) = [need for need in wanted() if need.name == name]
    assert hole not in need.specifier
