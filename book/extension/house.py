"""What the site needs beyond jupyter-book: maths without a network, docstrings as they are written
here, alt texts, launch buttons, and a refusal to show a chapter in which a cell failed.

IRANN_REPOSITORY=https://github.com/OWNER/NAME at build time adds the button that opens a chapter on
Binder: only whoever publishes the site knows where its notebooks are.
"""

import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from PIL import Image
from sphinx.errors import ExtensionError

INDEX = "book/figures"
MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2/", "input/tex/extensions/")


def setup(app):
    app.connect("config-inited", configure, priority=900)
    app.connect("env-get-outdated", index_anew)
    app.connect("env-before-read-docs", refuse_failures)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("doctree-resolved", index_pictures, priority=400)
    app.connect("doctree-resolved", describe_pictures)
    app.connect("build-finished", bring_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def configure(app, config):
    config.mathjax_path = "mathjax/tex-mml-chtml.js"  # below _static
    for listeners in app.events.listeners.values():  # thebe would load its code from a network
        listeners[:] = [
            one
            for one in listeners
            if getattr(one.handler, "__name__", "")
            not in ("init_thebe_core", "update_thebe_context")
        ]
    if address := os.environ.get("IRANN_REPOSITORY"):
        buttons = {"notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org"}
        config.html_theme_options |= {
            "repository_url": address,
            "repository_branch": "main",
            "path_to_docs": "",
            "use_repository_button": True,
            "launch_buttons": buttons,
        }


def index_anew(app, env, added, changed, removed):
    """-> the page of all pictures, wherever another page is built anew."""
    return [INDEX] if added | changed | removed else []


def refuse_failures(app, env, pages):
    """The site shows stored outputs. A chapter with a cell that failed, or never ran, ends the
    build.
    """
    for page in pages:
        path = Path(env.doc2path(page))
        if path.suffix == ".ipynb":
            cells = [
                cell
                for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
                if cell["cell_type"] == "code"
            ]
            for number, cell in enumerate(cells, start=1):
                failed = [out["evalue"] for out in cell["outputs"] if out["output_type"] == "error"]
                if failed or cell["execution_count"] is None:
                    raise ExtensionError(
                        f"{path}: code cell {number} "
                        f"{f'failed ({failed[0]})' if failed else 'never ran'}; run it anew"
                    )


def bring_mathjax(app, problem):
    """Copy MathJax, its fonts and its licence out of the installed distribution; its Python code
    never runs.
    """
    if problem or app.builder.format != "html":
        return
    to = Path(app.outdir) / "_static" / "mathjax"
    for file in importlib.metadata.distribution("django-static-mathjax").files:
        name = str(file).partition("static/mathjax/")[2]
        if (
            name == "LICENSE"
            or name.startswith("es5/")
            and name.removeprefix("es5/").startswith(MATHJAX)
        ):
            target = to / name.removeprefix("es5/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.locate(), target)


def docstring(app, what, name, thing, options, lines):
    """Our docstrings are Markdown's plainest part: paragraphs, `code`, tables. Make them
    reStructuredText, in place.
    """
    page = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        if (
            re.match(r"\s*\||\s{2,}\S|\s*- ", paragraph)
            or re.search(r"(?m)^\s{2,}\S", paragraph)
            or "import irann" in paragraph
        ):
            page += ["::", "", *("    " + line for line in paragraph.split("\n")), ""]
        else:
            page += [prose(" ".join(paragraph.split())), ""]
    lines[:] = page


def prose(paragraph):
    """A paragraph -> reStructuredText; a shape line in front is set as code."""
    shape = r"\((?:[^()]|\([^()]*\))*\)"
    shapes = re.match(rf"(?:(?:{shape}(?:, | and )?)+ )?-> {shape}", paragraph)
    code = f"``{shapes[0]}``\\ " if shapes else ""
    parts = re.split(r"(`+)(.+?)\1", paragraph[len(shapes[0]) if shapes else 0 :])
    for i in range(0, len(parts), 3):
        code += re.sub(r"([\\*_|`])", r"\\\1", parts[i])
        if i + 2 < len(parts):
            code += f"\\ ``{parts[i + 2]}``\\ "
    return code


def describe_pictures(app, doctree, page):
    """A picture without an alt text gets the paragraph that announces it: the text above a cell
    says what to look at. And a picture is as wide as it was drawn, an inch 100 pixels, however
    sharp it is.
    """
    above = ""
    for node in doctree.findall():
        if isinstance(node, nodes.paragraph):
            above = node.astext()
        elif isinstance(node, nodes.image) and not node.get("alt"):
            node["alt"] = "Figure. " + (
                above if len(above) < 300 else above[:300].rpartition(" ")[0] + " ..."
            ).replace("\n", " ")
        if isinstance(node, nodes.image) and "width" not in node:
            file = Path(app.srcdir, node["uri"])
            if file.suffix == ".png" and file.is_file():
                with Image.open(file) as picture:
                    dpi = picture.info.get("dpi", (100,))[0]
                    node["width"] = f"{round(picture.width * 100 / dpi)}px"


def index_pictures(app, doctree, page):
    """Fill the page INDEX: every picture of every chapter, small, with what it shows and a link to
    where it stands.
    """
    if page != INDEX:
        return
    here = next(doctree.findall(nodes.section))
    for chapter in sorted(name for name in app.env.found_docs if name.startswith("notebooks/")):
        tree = app.env.get_doctree(chapter)
        describe_pictures(app, tree, chapter)
        rows = nodes.bullet_list(classes=["irann-figures"])
        for picture in tree.findall(nodes.image):
            section = picture.parent
            while not isinstance(section, nodes.section):
                section = section.parent
            link = nodes.reference(
                refuri=f"{app.builder.get_relative_uri(page, chapter)}#{section['ids'][0]}",
                internal=True,
            )
            link += nodes.Text(section.next_node(nodes.title).astext())
            small = picture.deepcopy()
            small["width"] = "180px"
            words = nodes.paragraph("", "", link, nodes.Text(". " + said(picture["alt"])))
            rows += nodes.list_item("", nodes.paragraph("", "", small), words)
        if rows.children:
            here += [nodes.rubric("", tree.next_node(nodes.title).astext()), rows]


def said(alt, most=140):
    """-> an alt text's beginning, whole words."""
    alt = alt.removeprefix("Figure. ").replace("\n", " ")
    return alt if len(alt) <= most else alt[:most].rpartition(" ")[0] + " ..."
