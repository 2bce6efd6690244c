"""tests/chromium.py: the test command finds a browser, or gets one, or says what to type."""

import chromium
import pytest


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with nothing on its PATH but what a test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(chromium, "_playwrights_own", lambda: None)
    monkeypatch.setattr(chromium, "APPLICATIONS", ())
    chromium.get.cache_clear()
    yield tmp_path
    chromium.get.cache_clear()


def program(folder, name, does="exit 0"):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


def test_a_browser_of_any_name_is_found(bare):
    assert chromium.found() is None
    edge = program(bare, "microsoft-edge")
    assert chromium.get() == edge


def test_the_system_is_asked_for_one_where_playwright_has_none(bare, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[-1])
        if command[-2:] == ["-qq", "chromium"]:
            program(bare, "chromium")
        return chromium.subprocess.CompletedProcess(command, 1 if "playwright" in command else 0)

    monkeypatch.setattr(chromium.subprocess, "run", run)
    program(bare, "apt-get")
    assert chromium.get() == str(bare / "chromium")
    assert asked == ["chromium", "-qq", "chromium"]


def test_where_none_can_be_had_nothing_hangs_and_the_sentence_says_what_to_type(bare, monkeypatch):
    def run(command, **_):
        raise chromium.subprocess.TimeoutExpired(command, 300)

    monkeypatch.setattr(chromium.subprocess, "run", run)
    program(bare, "apt-get")
    assert chromium.get() is None
    assert "apt-get install chromium" in chromium.MISSING
