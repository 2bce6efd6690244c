"""python book/execute.py notebooks/01_gpt.md ...: run chapters from a fresh kernel and store the
.ipynb beside each .md, clean.

Clean means: no times and no widget states, which would differ at every run, and only the metadata
that the .md has. The .md is written again as JupyterLab saves it, so that an edit there changes
what was edited and nothing else.
"""

import base64
import io
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

PAIR = {
    "default_lexer": "ipython3",
    "formats": "ipynb,md:myst",
    "notebook_metadata_filter": "-jupytext.text_representation.jupytext_version",
}
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(page: Path) -> Path:
    """-> the .ipynb beside `page`. An error in a cell is raised, and nothing is stored."""
    notebook = jupytext.read(page)
    clean = {"record_timing": False, "store_widget_state": False, "coalesce_streams": True}
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(page.parent)}},
        **clean,
    ).execute()
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "jupytext": PAIR,
            "language_info": notebook.metadata.language_info,
        }
    )
    for cell in notebook.cells:
        if "outputs" in cell:  # a widget without its model is an error on the page
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    target = page.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    # last, for JupyterLab takes the newer side for the source
    page.write_text(as_markdown(target), "utf-8")
    return target


def as_markdown(notebook: Path) -> str:
    """-> the other side of a .ipynb, as JupyterLab would save it."""
    return jupytext.writes(jupytext.read(notebook), fmt="md:myst")


def smaller(picture: str) -> str:
    """A PNG in base64 -> the same with 128 colours, a quarter of the size: so that it may be
    sharp. It still says how many pixels are an inch: the site sets its width by that.
    """
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    dpi = {"dpi": image.info["dpi"]} if "dpi" in image.info else {}
    plain = {"method": Image.Quantize.FASTOCTREE, "dither": Image.Dither.NONE}
    colours = image.convert("RGB").quantize(128, **plain)
    file = io.BytesIO()
    colours.save(file, "png", optimize=True, **dpi)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("which chapters? python book/execute.py notebooks/*.md")
    for name in sys.argv[1:]:
        began = time.perf_counter()
        target = execute(Path(name))
        print(f"{target}: {time.perf_counter() - began:.0f} s, {target.stat().st_size:,} bytes")
