"""The live pieces in the site: a directive, one piece beside each chapter, and the files they load.

Engine and weights go below _static/live as classic scripts, so that a page opened from a disk can
load them; a browser does so when a piece is first touched.
"""

import shutil
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

from irann import export, shakespeare, zoo

HERE = Path(__file__).parents[1] / "live"
CHAPTERS = {  # the piece that stands before a chapter's exercises
    "notebooks/00_text": "cost",
    "notebooks/01_gpt": "attention",
    "notebooks/02_thinker": "rounds",
    "notebooks/03_diffusion": "denoise",
    "notebooks/03c_page": "gaps",
    "notebooks/04_mamba": "forget",
    "notebooks/05_compare": "write",
    "notebooks/06_chat": "chat",
}


def setup(app):
    app.add_directive("live", Live)
    app.connect("doctree-resolved", add_to_chapter)
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", write_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


class Live(Directive):
    """A live piece, by its name in `irann.export.PIECES`."""

    required_arguments = 1

    def run(self):
        return [nodes.raw("", export.box(self.arguments[0]), format="html")]


def add_to_chapter(app, doctree, page):
    """Put a chapter's live piece before its exercises, or at its end."""
    if page not in CHAPTERS or app.builder.format != "html":
        return
    chapter = doctree.next_node(nodes.section)
    exercises = [
        i
        for i, part in enumerate(chapter.children)
        if isinstance(part, nodes.section)
        and part.next_node(nodes.title).astext().lower().lstrip("0123456789. ").startswith("exerc")
    ]
    at = exercises[0] if exercises else len(chapter)
    piece = CHAPTERS[page]
    heading = nodes.rubric("", f"Live in this page: {export.PIECES[piece][0].lower()}")
    chapter[at:at] = [heading, nodes.raw("", export.box(piece), format="html")]


def add_scripts(app, page, template, context, doctree):
    if 'class="irann-live"' in context.get("body", ""):
        app.add_css_file("live/live.css")
        app.add_css_file("live/stills.css")
        app.add_js_file("live/live.js", loading_method="defer")


def write_files(app, problem):
    if problem or app.builder.format != "html":
        return
    to = Path(app.outdir) / "_static" / "live"
    to.mkdir(parents=True, exist_ok=True)
    for file in [*export.LIVE.glob("live.*"), *HERE.glob("still*")]:
        shutil.copyfile(file, to / file.name)
    scripts = {"engine": export.engine_script(), "counts": export.counts_script(shakespeare.load())}
    for name in zoo.MODELS:
        scripts[name] = export.model_script(zoo.load(name), name)
    for name, script in scripts.items():
        (to / f"{name}.js").write_text(script, encoding="utf-8")
