"""JupyterLab on this machine, Chromium without a window, and one notebook cell with a chat in
it.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import TimeoutError

from irann import zoo
from irann.text import Text, Vocabulary
from irann.training import train

PATIENCE = 90  # seconds a busy machine may take for one thing
# the model must know the characters of a script, else the session leaves them out
MARKUP = "<>=\"()/'.:0123456789"
CELL = """import torch
torch.set_num_threads(1)
from irann import Chat, zoo
zoo.shipped = list  # the runs beside this notebook, whatever comes with the package
Chat("gpt", length=100_000, mode="plain")"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A failed test names a picture of what the reader would have seen."""
    try:
        return (yield)
    except Exception as error:
        if "page" in item.funcargs:
            photograph(item.funcargs["page"], item.funcargs["tmp_path"], error)
        raise


def photograph(page, folder: Path, error: Exception) -> None:
    path = folder / "screen.png"
    page.screenshot(path=path)
    error.add_note(f"screenshot: {path}")


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    """A notebook, and two models that were trained for a moment."""
    folder = tmp_path_factory.mktemp("browser")
    vocabulary = Vocabulary(corpus.vocabulary.characters + MARKUP)
    ids = [
        vocabulary.encode(corpus.vocabulary.decode(part))
        for part in (corpus.train[:6000], corpus.val[:700])
    ]
    small = Text(*ids, vocabulary, "an excerpt", "0" * 64)
    for name in ("gpt", "diffusion"):
        config, recipe = zoo.recipe(name, "tiny", steps=20)
        config = type(config)(**(vars(config) | {"vocabulary": len(vocabulary)}))
        list(train(zoo.build(name, config), small, recipe, run=folder / "runs" / name))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, folder / "chat.ipynb")
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    return folder


@pytest.fixture(scope="module")
def address(folder) -> str:
    """A JupyterLab that nobody else can reach, with a home of its own -> the notebook's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root, token = f"http://127.0.0.1:{port}", os.urandom(16).hex()
    homes = {
        "HOME": "home",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    homes |= {f"JUPYTER_{kind}_DIR": kind.lower() for kind in ("CONFIG", "DATA", "RUNTIME")}
    env = (
        os.environ
        | {name: str(folder / place) for name, place in homes.items()}
        | {"OMP_NUM_THREADS": "1"}
    )
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
    ]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    with (folder / "lab.log").open("w") as log:
        lab = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + PATIENCE
        while not _answers(f"{root}/api"):
            assert lab.poll() is None and time.monotonic() < end, (folder / "lab.log").read_text()[
                -3000:
            ]
            time.sleep(0.1)
        yield f"{root}/lab/tree/chat.ipynb?reset&token={token}"
    finally:
        lab.terminate()  # the server ends its kernels
        try:
            lab.wait(20)
        except subprocess.TimeoutExpired:
            lab.kill()
            lab.wait()


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def page(browser, address, folder):
    """The notebook in a browser, its cell executed and the chat on the screen."""
    page = browser.new_context(viewport={"width": 1100, "height": 1000}).new_page()
    try:
        page.goto(address, timeout=PATIENCE * 1000)
        _wait_for_kernel(page)
        _execute(page)
        page.wait_for_selector(".irann-chat .irann-scene", timeout=PATIENCE * 1000)
    except Exception as error:
        photograph(page, folder, error)
        raise
    return page


def _execute(page) -> None:
    """Run the cell: on a busy machine the first keys may come before the kernel hears them."""
    for _ in range(4):
        page.locator(".jp-Notebook .cm-content").first.click()
        page.keyboard.press("Escape")
        page.keyboard.press("Control+Enter")
        with suppress(TimeoutError):
            page.wait_for_function(
                "document.querySelector('.jp-InputPrompt').textContent != '[ ]:'", timeout=15_000
            )
            return


def _wait_for_kernel(page) -> None:
    """JupyterLab sometimes asks which kernel to take; the one it proposes is right."""
    end = time.monotonic() + PATIENCE
    ready = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    accept = page.locator(".jp-Dialog button.jp-mod-accept")
    calm = 0
    while calm < 4:  # the dialog may come after the first idle
        assert time.monotonic() < end, "the notebook's kernel did not become idle"
        if accept.count():
            accept.first.click()
        calm = calm + 1 if ready.count() and not accept.count() else 0
        time.sleep(0.3)
