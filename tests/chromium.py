"""A browser for the tests that look at pages: the one that is here, else one that is got."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
)
APPLICATIONS = ("Google Chrome", "Chromium", "Microsoft Edge")  # of a Mac
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()
MISSING = (
    "no Chromium, Chrome or Edge is here and none could be got, so the chat and the site are not "
    "tried in a browser: install one (on Debian: apt-get install chromium) and run the tests again"
)
# JavaScript: how far the text of each part that a selector finds stands out, as WCAG counts it
CONTRAST = """selector => {
    const light = colour => colour.map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
    const ground = part => part ? over(parse(getComputedStyle(part).backgroundColor), ground(part.parentElement)) : [255, 255, 255];
    const ratio = part => {
        const style = getComputedStyle(part), below = ground(part), text = parse(style.color);
        const ink = over([...text.slice(0, 3), (text[3] ?? 1) * style.opacity], below);
        const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
        return (a + .05) / (b + .05);
    };
    return [...document.querySelectorAll(selector)].map(ratio);
}"""


def found() -> str | None:
    """-> the program of a browser on this machine."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    for name in APPLICATIONS:
        path = Path("/Applications", f"{name}.app", "Contents", "MacOS", name)
        if path.is_file():
            return str(path)
    return _playwrights_own()


def _playwrights_own() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        path = play.chromium.executable_path
    return path if path and Path(path).is_file() else None


@functools.cache
def get() -> str | None:
    """-> the browser that is here, else playwright's download, else the system's package where the
    user may install one. None where all of that fails.
    """
    if path := found():
        return path
    print("no browser is here: getting one for the tests", file=sys.stderr)
    ways = [[[sys.executable, "-m", "playwright", "install", "chromium"]]]
    if shutil.which("apt-get"):
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        update = [*root, "apt-get", "update", "-qq"]
        ways.append([update, [*root, "apt-get", "install", "-y", "-qq", "chromium"]])
    for way in ways:
        if all(_runs(command) for command in way) and (path := found()):
            return path
    return None


def _runs(command: list[str]) -> bool:
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
