"""What a reader at JupyterLab sees while cells run: how long a slow one has taken, and, after Run
All, the place where he was instead of the notebook's end.

None of it happens where nobody watches, when a notebook is executed or tested: a kernel that may
ask for input has a reader, and only such a kernel. So nothing of it is ever stored in the book.
"""

import threading
import time
from typing import Any

PATIENCE = 3.0  # seconds that a cell may take without a word

# Run All makes the last cell the active one and scrolls there at once. The first cell, when it has
# run, brings the page back to itself. VS Code and Colab may hand the script no element of a page.
BACK = """
setTimeout(() => {
  if (typeof element === "undefined" || !(element instanceof Element)) return
  const here = element.closest(".jp-Cell"), notebook = element.closest(".jp-Notebook")
  const cells = notebook ? [...notebook.querySelectorAll(".jp-Cell")] : []
  if (here && cells.at(-1).classList.contains("jp-mod-active"))
    here.scrollIntoView({block: "start"})
}, 200)
"""


def attend() -> None:
    """Watch the cells of this notebook, if somebody reads it."""
    import IPython
    from IPython.display import display

    shell: Any = IPython.get_ipython()
    if shell is None or not getattr(getattr(shell, "kernel", None), "_allow_stdin", False):
        return
    if not hasattr(shell, "_irann_watch"):
        shell._irann_watch = Watch()
        shell.events.register("pre_run_cell", shell._irann_watch.begin)
        shell.events.register("post_run_cell", shell._irann_watch.end)
    display({"application/javascript": BACK}, raw=True)


class Watch:
    """Says in one line below a cell how long it has been running, once it takes long."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self, info: Any) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._say, args=(self.over,), daemon=True)
        self.thread.start()

    def end(self, result: Any) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join(1)

    def _say(self, over: threading.Event) -> None:
        from IPython.display import display

        began = time.monotonic()
        line = None
        while not over.wait(1.0 if line else PATIENCE):
            text = _small(f"running, {time.monotonic() - began:.0f} s")
            if line is None:
                line = display(text, raw=True, display_id=True)
            else:
                line.update(text, raw=True)
        if line is not None:
            line.update(_small(f"{time.monotonic() - began:.0f} s"), raw=True)


def _small(words: str) -> dict[str, str]:
    """-> a line of output, for a page and for a terminal."""
    return {"text/html": f"<small>{words}</small>", "text/plain": words}
