"""The book builds from the stored notebooks without a warning, and its pages say what is true."""

import base64
import io
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from docutils import nodes
from docutils.utils import new_document
from helpers import book_module
from PIL import Image
from sphinx.errors import ExtensionError

from irann import export, figures, zoo

ROOT = Path(__file__).parents[1]


def test_every_page_is_built(site):
    for page in re.findall(r"(?:root|file): (\S+)", (ROOT / "book/_toc.yml").read_text()):
        assert "<h1>" in (site / f"{page}.html").read_text(), page


def test_every_notebook_is_in_the_book():
    toc = (ROOT / "book/_toc.yml").read_text()
    notebooks = list((ROOT / "notebooks").glob("*.ipynb"))
    assert len(notebooks) > 10
    for notebook in notebooks:
        assert f"notebooks/{notebook.stem}" in toc, notebook.name


def test_the_notation_page_has_every_letter_of_the_legend():
    from irann import core

    page = (ROOT / "book/notation.md").read_text()
    letters = re.findall(r"\| (\w+) +\| \w", core.__doc__)
    assert {"b", "t", "s", "d", "h", "c", "e", "n", "r", "v", "tau"} <= set(letters)
    for letter in set(letters) - {"letter"}:
        assert f"`{letter}`" in page, letter


GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nabla nu xi pi rho sigma tau phi chi psi omega".split()
ACCENTS = r"\\(?:bar|tilde|hat|mathrm|mathcal|text|ln|lvert|underbrace)\b"


def letter_of(row):
    """-> where the first letter of a row of the legend belongs: Latin ones first, then Greek ones."""
    sign = re.sub(ACCENTS, "", row.replace(r"\ell", "l"))
    greek, latin = re.match(r"\| [^\\A-Za-z]*(?:\\([A-Za-z]+)|([A-Za-z]))", sign).groups()
    greek = (greek or "").removeprefix("var").lower()
    if greek in GREEK:
        return 1, GREEK.index(greek)
    return 0, (latin or greek).lower()


def test_every_table_of_the_legend_is_in_alphabetical_order():
    chapters = (ROOT / "book/notation.md").read_text().split("\n## Chapter ")[1:]
    for chapter in chapters:
        rows = re.findall(r"(?m)^\| .*", chapter.partition("\n## ")[0])[1:]
        letters = [letter_of(row) for row in rows if not row.startswith("|---")]
        assert letters == sorted(letters), (chapter[:20], letters)


def test_what_a_chapter_cites_is_in_the_references():
    listed = (ROOT / "book/references.md").read_text()
    pages = "".join(page.read_text() for page in (ROOT / "notebooks").glob("*.md"))
    papers = set(re.findall(r"arxiv.org/abs/([\d.]+\d)", pages))
    assert len(papers) > 10 and {paper for paper in papers if paper not in listed} == set()


def test_the_page_of_promises_names_tests_that_exist():
    names = re.findall(r"`((?:\w+/)*test_\w+\.py)`", (ROOT / "book/promises.md").read_text())
    assert "browser/test_widget.py" in names and len(set(names)) > 10
    for name in names:
        assert (ROOT / "tests" / name).is_file(), name


class Page(HTMLParser):
    """What a page fetches by itself (scripts, styles, fonts, pictures), where its links lead, its anchors and alt texts."""

    def __init__(self, path):
        super().__init__()
        self.fetched, self.links, self.anchors, self.alts = [], [], {""}, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        of = dict(attributes)
        self.anchors |= {of.get("id"), of.get("name")}
        if tag == "a":
            self.links.append(of.get("href") or "")
        elif tag == "link":
            self.fetched += (
                [of["href"]]
                if of["rel"] not in ("index", "search", "next", "prev", "canonical")
                else []
            )
        elif "src" in of:
            self.fetched.append(of["src"])
            self.alts += [of.get("alt")] if tag == "img" else []


@pytest.fixture(scope="module")
def pages(site):
    return {
        path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts
    }


def test_no_page_fetches_anything_from_a_network(site, pages):
    for path, page in pages.items():
        for address in page.fetched:
            assert not re.match(r"(\w+:)?//", address), (path.name, address)
            assert (
                address.startswith("data:")
                or (path.parent / unquote(urlsplit(address).path)).is_file()
            ), (path.name, address)
    for style in site.rglob("*.css"):
        assert not re.search(r"""(url\(|@import)\s*["']?(https?:)?//""", style.read_text()), (
            style.name
        )
    scripts = "".join(path.read_text() for path in pages)
    assert not re.search(r"unpkg|jsdelivr|cdnjs|googleapis", scripts)


def test_the_maths_comes_with_the_site(site):
    page = (site / "notebooks" / "01_gpt.html").read_text()
    assert "_static/mathjax/tex-mml-chtml.js" in page and 'class="math' in page
    mathjax = site / "_static" / "mathjax"
    script = (mathjax / "tex-mml-chtml.js").read_text()
    fonts = set(re.findall(r"MathJax_[\w-]+", script.partition("woff-v2")[2])) & {
        f.stem for f in mathjax.rglob("*.woff")
    }
    assert len(fonts) >= 20 and "Apache License" in (mathjax / "LICENSE").read_text()


def test_links_within_the_book_lead_somewhere(pages):
    by_path = {path.resolve(): page for path, page in pages.items()}
    for path, page in pages.items():
        for link in page.links:
            where = urlsplit(link)
            if where.scheme or where.netloc or path.name in ("search.html", "genindex.html"):
                continue
            target = (path.parent / unquote(where.path)).resolve() if where.path else path.resolve()
            assert target.is_file(), (path.name, link)
            assert target not in by_path or where.fragment in by_path[target].anchors, (
                path.name,
                link,
            )


def test_every_figure_can_be_read_aloud(pages):
    alts = [
        (path.name, alt)
        for path, page in pages.items()
        if path.parent.name in ("book", "notebooks")
        for alt in page.alts
    ]
    assert len(alts) > 15
    for name, alt in alts:
        assert alt and len(alt) > 30 and "_images" not in alt, (name, alt)


def test_every_figure_is_in_the_index(site, pages):
    index = pages[site / "book" / "figures.html"]
    chapters = [page for path, page in pages.items() if path.parent.name == "notebooks"]
    assert len(index.alts) == sum(len(page.alts) for page in chapters) > 40
    assert (
        len({link for link in index.links if link.startswith("../notebooks/") and "#" in link}) > 30
    )


def opened(page, path):
    """Open a page of the site and wait until its formulas are set."""
    page.goto(path.as_uri(), timeout=120_000)
    if 'class="math' in path.read_text():
        page.wait_for_function("window.MathJax?.startup?.promise", timeout=120_000)
        # house.js waits for the same, and was first
        page.evaluate("MathJax.startup.promise.then(() => document.fonts.ready).then(() => true)")
        assert page.locator("mjx-container").count() > 0, path.name
        assert page.locator("mjx-merror").count() == 0, path.name


UNREACHABLE = """[...document.querySelectorAll("div.math")].filter(box => {
    const left = Math.min(...[...box.querySelectorAll("mjx-c")].map(sign => sign.getBoundingClientRect().left))
    const cut = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX != "auto"
    return cut || left < box.getBoundingClientRect().left - 1
}).map(box => box.innerText)"""  # equations that begin left of their box, where no scrolling leads, or are cut off at the right


BEYOND = """(() => { const edge = document.querySelector(".bd-article").getBoundingClientRect().right + 1
return [...document.querySelectorAll('.bd-article mjx-container:not([display="true"]) mjx-math')].filter(formula =>
    formula.getBoundingClientRect().right > edge && !formula.closest("table, .irann-long")
).map(formula => formula.closest("p, li").innerText) })()"""  # formulas in a line that pass the edge of the page


TOO_WIDE = """[...document.querySelectorAll("div.math, div.math mjx-container")].filter(
    box => box.scrollWidth > box.clientWidth + 2
).map(box => box.innerText)"""  # equations to be scrolled, which hides their numbers


CUT = """[...document.querySelectorAll(".cell_input pre")].filter(code => code.scrollWidth > code.clientWidth + 1)
.map(code => code.innerText)"""
WIDTHS = """[...document.querySelectorAll(".cell_output img")].map(picture => [picture.clientWidth, picture.naturalWidth])"""


def test_a_phone_sets_every_equation_and_at_a_desk_all_fits_and_pictures_are_wide(site, browser):
    page = browser.new_page()
    chapters = sorted(site.glob("notebooks/*.html"))
    for path in [*chapters, site / "book/figures.html", site / "book/api.html"]:
        page.set_viewport_size({"width": 390, "height": 800})
        opened(page, path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path.name
        assert page.evaluate(UNREACHABLE) == [], path.name
        assert page.evaluate(BEYOND) == [], path.name
        if path not in chapters:
            continue
        page.set_viewport_size({"width": 1280, "height": 900})
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        assert page.evaluate(CUT) == [], path.name
        assert page.evaluate(TOO_WIDE) == [], path.name
        sizes = page.evaluate(WIDTHS)
        assert max(shown for shown, _ in sizes) >= 700, (path.name, sizes)
        assert all(drawn >= 1.9 * shown for shown, drawn in sizes), (path.name, sizes)
    page.close()


def test_in_the_dark_a_figure_is_a_white_card(site, browser):
    dark = browser.new_page(color_scheme="dark")
    dark.goto((site / "notebooks/00_text.html").as_uri(), timeout=120_000)
    assert dark.evaluate("document.documentElement.dataset.theme") == "dark"
    card = dark.evaluate("""(() => { const style = getComputedStyle(document.querySelector(".cell_output img"))
    return [style.backgroundColor, style.filter] })()""")
    assert card == ["rgb(255, 255, 255)", "none"]
    dark.close()


def test_the_reference_shows_docstrings_and_source(site):
    page = (site / "book" / "api.html").read_text()
    for name in (
        "core.attention.attention",
        "core.halting.halting_distribution",
        "core.noise.Schedule",
        "core.scan.selective_scan",
        "sampling.filter_logits",
        "text.windows",
        "models.gpt.GPT",
        "models.mamba.Mamba",
        "training.loop.train",
        "zoo.load",
        "shakespeare.load",
    ):
        assert f'id="irann.{name}"' in page, name
    assert "stretches of the text" in page
    words = re.sub("<[^>]*>", "", page)  # shapes are types, beside the arguments
    assert re.search(r"q:\s*Float\[Tensor, .b h t c.\]", words.replace("\n", ""))
    assert page.count("viewcode-link") > 80
    assert "system-message" not in page and not re.search(r"<p>[^<]*``", page)


DRAWN = """import matplotlib.pyplot as plt
from irann import figures
figures.use()
plt.plot([1, 2])
plt.show()"""


MOVED = """from IPython.display import display
display({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "a slider"}, raw=True)
print("beside", open("page.md").name)"""


def test_execute_stores_a_clean_notebook(tmp_path):
    page = tmp_path / "page.md"
    header = (ROOT / "notebooks/01_gpt.md").read_text().partition("# 1")[0]
    cells = ("print(1 + 1)", DRAWN, MOVED)
    page.write_text(
        header + "".join(f"\n```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells)
    )
    notebook = nbformat.read(book_module("execute.py").execute(page), as_version=4)
    summed, drawn, moved = notebook.cells[-3:]
    assert [out.get("text") for out in moved.outputs] == ["beside page.md\n"]
    assert summed.outputs[0].text == "2\n" and summed.execution_count == 1
    shown = drawn.outputs[0].metadata["image/png"]
    picture = Image.open(io.BytesIO(base64.b64decode(drawn.outputs[0].data["image/png"])))
    assert shown["width"] >= 700 and picture.width // 2 == shown["width"]
    assert round(picture.info["dpi"][0]) == 200  # the site divides by it
    assert picture.mode == "P" and len(picture.getcolors()) <= 128
    stored = nbformat.read(ROOT / "notebooks/01_gpt.ipynb", as_version=4).metadata
    assert (
        notebook.metadata.keys() == stored.keys() and notebook.metadata.jupytext == stored.jupytext
    )
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    pair = page.with_suffix(".ipynb").stat().st_mtime, page.stat().st_mtime
    assert pair[0] <= pair[1]  # JupyterLab opens no pair whose source is older and differs


def test_the_citation_and_the_licence_agree_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "book/CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert "MIT License" in (ROOT / project["license-files"][0]).read_text()


# ------------------------------------------------------------------------ what the site is made by


@pytest.mark.parametrize(
    "said, set_as",
    [
        ("-> y (b t e) of `x`.", r"-> y (b t e) of \ ``x``\ ."),
        ("(b t) -> (b t d): a *star*, a_b", r"``(b t) -> (b t d)``\ : a \*star\*, a\_b"),
        ("(n), (m (a b)) and (k) -> (n k)", r"``(n), (m (a b)) and (k) -> (n k)``\ "),
    ],
)
def test_a_docstring_s_shapes_and_code_are_set_as_code(said, set_as):
    assert book_module("extension/house.py").prose(said) == set_as


def test_a_docstring_s_tables_and_examples_stay_as_they_are():
    lines = ["One", "sentence.", "", "| a | b |", "|---|---|", "", "    x = 1", "", "- a list", ""]
    book_module("extension/house.py").docstring(None, "", "", None, None, lines)
    table = ["::", "", "    | a | b |", "    |---|---|", ""]
    code, listed = ["::", "", "        x = 1", ""], ["::", "", "    - a list", ""]
    assert lines == ["One sentence.", "", *table, *code, *listed]


def picture(**attributes):
    return nodes.image("", **attributes)


def test_a_picture_says_what_stands_above_it_and_is_as_wide_as_it_was_drawn(tmp_path):
    house, page = book_module("extension/house.py"), new_document("page")
    Image.new("RGB", (640, 20)).save(tmp_path / "a.png", dpi=(200, 200))
    Image.new("RGB", (640, 20)).save(tmp_path / "b.png")
    mine = picture(uri="b.png", alt="mine", width="7px")
    long = nodes.paragraph("", "letters " * 80)
    page += [
        nodes.paragraph("", "far above"),
        nodes.paragraph("", "two\nlines"),
        picture(uri="a.png"),
    ]
    page += [picture(uri="b.png"), mine, long, picture(uri="none.png")]
    house.describe_pictures(SimpleNamespace(srcdir=tmp_path), page, "page")
    sharp, plain, mine, last = page.findall(nodes.image)
    assert (sharp["alt"], sharp["width"]) == ("Figure. two lines", "320px")
    assert (plain["alt"], plain["width"]) == ("Figure. two lines", "640px")
    assert (mine["alt"], mine["width"]) == ("mine", "7px") and "width" not in last
    assert last["alt"] == "Figure. " + " ".join(["letters"] * 37 + ["..."])
    assert house.said(last["alt"]) == " ".join(["letters"] * 17 + ["..."])
    assert house.said("Figure. A\nB") == "A B"


def test_the_page_of_pictures_says_of_each_what_it_shows_and_leads_to_where_it_stands(tmp_path):
    house, index = book_module("extension/house.py"), new_document("index")
    index += nodes.section("", nodes.title("", "All pictures"))
    page = new_document("page")
    part = nodes.section("", nodes.title("", "The head"), ids=["the-head"])
    part += [nodes.paragraph("", "Who looks where"), picture(uri="a.png")]
    page += nodes.section(
        "", nodes.title("", "GPT"), nodes.paragraph("", "words"), part, ids=["gpt"]
    )
    trees = {"notebooks/01_gpt": page, "notebooks/02_none": chapter("One"), "book/intro": page}
    env = SimpleNamespace(found_docs=set(trees), get_doctree=trees.get)
    builder = SimpleNamespace(get_relative_uri=lambda here, there: f"{there}.html")
    app = SimpleNamespace(srcdir=tmp_path, env=env, builder=builder)
    house.index_pictures(app, index, "book/intro")
    assert not list(index.findall(nodes.image))
    house.index_pictures(app, index, "book/figures")
    (link,) = index.findall(nodes.reference)
    assert (link["refuri"], link.astext()) == ("notebooks/01_gpt.html#the-head", "The head")
    assert link.parent.astext() == "The head. Who looks where"
    assert [each.astext() for each in index.findall(nodes.rubric)] == ["GPT"]
    assert [each["uri"] for each in index.findall(nodes.image)] == ["a.png"]


def at(event):
    """-> what the site's extension does at an event of Sphinx's."""
    app = Mock()
    book_module("extension/house.py").setup(app)
    (answer,) = [call.args[1] for call in app.connect.call_args_list if call.args[0] == event]
    return answer


def test_all_figures_are_gathered_anew_where_any_page_is():
    gather = at("env-get-outdated")
    assert gather(None, None, set(), {"notebooks/01_gpt"}, set()) == ["book/figures"]
    assert gather(None, None, set(), set(), set()) == []


@pytest.mark.parametrize("address", ["", "https://example.org/me/irann"])
def test_the_site_has_a_button_for_binder_if_it_is_told_where_its_notebooks_are(
    address, monkeypatch
):
    monkeypatch.setenv("IRANN_REPOSITORY", address)
    config = SimpleNamespace(html_theme_options={"kept": 1})

    def init_thebe_core():
        pass

    listeners = {"event": [SimpleNamespace(handler=f) for f in (init_thebe_core, print)]}
    app = SimpleNamespace(events=SimpleNamespace(listeners=listeners))
    book_module("extension/house.py").configure(app, config)
    assert [one.handler for one in listeners["event"]] == [print]
    options = config.html_theme_options
    assert options["kept"] == 1 and options.get("repository_url", "") == address
    assert ("binderhub_url" in options.get("launch_buttons", {})) == bool(address)


def test_a_chapter_with_a_cell_that_failed_or_never_ran_is_not_shown(tmp_path):
    refuse, page = at("env-before-read-docs"), tmp_path / "page.ipynb"
    cells = [nbformat.v4.new_markdown_cell("words"), nbformat.v4.new_code_cell("1")]
    cells += [nbformat.v4.new_code_cell("2")]
    env = SimpleNamespace(doc2path=lambda name: tmp_path / name)

    def refused():
        nbformat.write(nbformat.v4.new_notebook(cells=cells), page)
        try:
            refuse(None, env, ["words.md", "page.ipynb"])
        except ExtensionError as error:
            return str(error).partition(": ")[2]

    cells[1].execution_count = 1
    assert refused() == "code cell 2 never ran; run it anew"
    cells[2].execution_count = 2
    assert refused() is None
    cells[1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="no", traceback=[])]
    assert refused() == "code cell 1 failed (no); run it anew"


def chapter(*titles):
    page = new_document("page")
    page += nodes.section("", nodes.title("", "A chapter"), nodes.paragraph("", "words"))
    page[0] += [nodes.section("", nodes.title("", title)) for title in titles]
    return page


def test_a_chapter_s_live_piece_is_about_its_model():
    for page, piece in book_module("extension/live.py").CHAPTERS.items():
        assert (ROOT / f"{page}.md").is_file() and piece in export.PIECES
        name = page.partition("_")[2].replace("page", "thinker-page")
        assert name not in zoo.MODELS or name in export.PIECES[piece][1], page


@pytest.mark.parametrize(
    "titles, place", [(("One", "4.2 Exercises", "Further"), 3), (("One", "An exercise"), 4)]
)
def test_a_live_piece_stands_before_a_chapter_s_exercises_or_at_its_end(titles, place):
    live = book_module("extension/live.py")
    html = SimpleNamespace(builder=SimpleNamespace(format="html"))
    page = chapter(*titles)
    live.add_to_chapter(html, page, "notebooks/04_mamba")
    heading, piece = page[0][place : place + 2]
    assert heading.astext() == "Live in this page: what the state still remembers"
    assert 'data-piece="forget"' in piece.astext() and len(page[0]) == 4 + len(titles)
    latex = SimpleNamespace(builder=SimpleNamespace(format="latex"))
    for app, name in ((html, "notebooks/04b_other"), (latex, "notebooks/04_mamba")):
        page = chapter(*titles)
        live.add_to_chapter(app, page, name)
        assert len(page[0]) == 2 + len(titles)


def test_only_a_page_with_a_live_piece_loads_its_script():
    live, loaded = book_module("extension/live.py"), []
    app = SimpleNamespace(
        add_css_file=loaded.append, add_js_file=lambda name, **_: loaded.append(name)
    )
    for body in ("<p>irann-live</p>", ""):
        live.add_scripts(app, "", "", {"body": body}, None)
    assert loaded == []
    live.add_scripts(app, "", "", {"body": '<div class="irann-live">'}, None)
    assert loaded == ["live/live.css", "live/stills.css", "live/live.js"]


def test_a_build_that_failed_is_given_no_files(tmp_path):
    app = SimpleNamespace(outdir=tmp_path, builder=SimpleNamespace(format="html"))
    for module, write in (("live", "write_files"), ("house", "bring_mathjax")):
        getattr(book_module(f"extension/{module}.py"), write)(app, ValueError("no"))
    app.builder.format = "latex"
    for module, write in (("live", "write_files"), ("house", "bring_mathjax")):
        getattr(book_module(f"extension/{module}.py"), write)(app, None)
    assert list(tmp_path.iterdir()) == []


def test_in_the_moving_picture_ink_has_settled_and_grey_is_a_guess():
    """Newlines before the text are not drawn, but count; a long line is broken and none is lost."""
    moving = book_module("moving.py")
    drawn = []
    pen = SimpleNamespace(text=lambda at, sign, colour, font: drawn.append((at, sign, colour)))
    text = "\n\nab\n\n" + "c" * 30 + " " + "d" * 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving.ImageDraw, "Draw", lambda picture: pen)
        shown = moving.draw({"gpt": SimpleNamespace(text=text, settled=7)})
    assert (shown.height, drawn[0][1:]) == (6 * 20 + 28, ("gpt", figures.HUES["gpt"]))
    signs = "".join(sign for _, sign, _ in drawn[1:])
    assert signs == text.replace("\n", "")
    settled = [sign for _, sign, colour in drawn[1:] if colour == figures.INK]
    assert settled == ["a", "b", "c"]  # of seven, four are newlines
    rows = [(y - 14) // 20 for (_, y), *_ in drawn[1:]]
    assert rows == [1] * 2 + [3] * 31 + [4] * 20


def test_the_moving_picture_goes_evenly_from_the_first_moment_to_the_last_and_rests_there(
    tmp_path, monkeypatch
):
    moving = book_module("moving.py")
    text = "Thou art a moving picture.\n" * 4
    reply = [SimpleNamespace(text=text, settled=settled) for settled in range(101)]
    session = SimpleNamespace(say=lambda text: None, reply=lambda: iter(reply))
    monkeypatch.setattr(moving, "Session", lambda name, **settings: session)
    shown = [frame.settled for frame in moving.frames_of("gpt")]
    steps = [after - before for before, after in zip(shown, shown[1:])]
    assert (len(shown), shown[0], shown[-1]) == (moving.COUNT, 0, 100)
    assert max(steps) - min(steps) <= 1
    first, last = (
        moving.draw({"gpt": reply[0], "diffusion": reply[n]}).convert("L") for n in (0, 100)
    )
    middle = first.width // 2
    halves = [
        (picture.crop((0, 0, middle, 128)), picture.crop((middle, 0, 2 * middle, 128)))
        for picture in (first, last)
    ]
    assert halves[0][0].tobytes() == halves[1][0].tobytes()  # each model in its own half
    assert halves[0][1].tobytes() != halves[1][1].tobytes()
    monkeypatch.setattr(moving, "__file__", str(tmp_path / "moving.py"))
    (tmp_path / "images").mkdir()
    moving.main()
    picture = Image.open(tmp_path / "images" / "writing.gif")
    times = []
    for number in range(picture.n_frames):
        picture.seek(number)
        times.append(picture.info["duration"])
    assert times == [160] * (moving.COUNT - 1) + [4000] and picture.info["loop"] == 0


def test_students_get_what_they_write_empty_and_no_solution(tmp_path, capsys):
    student = book_module("student.py")
    student.main(str(tmp_path / "class"))
    table = (ROOT / "book/teaching.md").read_text()
    for entry in student.WRITTEN:
        chapter, name = entry.split(":")
        notebook = nbformat.read(tmp_path / "class/notebooks" / f"{chapter}.ipynb", as_version=4)
        whole = nbformat.read(ROOT / "notebooks" / f"{chapter}.ipynb", as_version=4)
        assert all(f"`{part}`" in table for part in name.split(".")), entry
        sources = [cell.source for cell in notebook.cells]
        assert f' raise NotImplementedError("write {name}")\n' in "\n".join([*sources, ""])
        assert not any(cell.get("outputs") for cell in notebook.cells)
        assert not any("<details>" in source for source in sources)
        tasks, all_tasks = (
            next(i for i, c in enumerate(each) if "## Exercises" in c.source.splitlines())
            for each in (notebook.cells, whole.cells)
        )
        assert "".join(sources[tasks:]).count("(easy") >= 2 and tasks == all_tasks
        assert not any("hide-cell" in c.metadata.get("tags", []) for c in notebook.cells[tasks:])
        # all else is as it was: where the body is put back, the cell is the chapter's
        originals = {cell.source for cell in whole.cells}
        emptied = [cell for cell in notebook.cells if "NotImplementedError" in cell.source]
        code = [c.source for c in notebook.cells if c.cell_type == "code" and c not in emptied]
        assert emptied and len(code) > 15 and originals >= set(code)
        for cell in emptied:
            lines = cell.source.splitlines()
            kept = [line for line in lines if "raise NotImplementedError" not in line]
            assert any(is_within(kept, original.splitlines()) for original in originals)
    with pytest.raises(ValueError, match="01_gpt.md defines no Hat.forward"):
        student.main(str(tmp_path / "other"), "01_gpt:Hat.forward")


def is_within(some, lines):
    """Whether all of `some` stand among the lines, in this order."""
    rest = iter(lines)
    return all(line in rest for line in some)


# a private word of the first edition: what may still stand, and how often
WORDS = {
    r"(?<!log[- ])odds": 0,  # for a probability; log odds are what they say
    r"paces?": 0,  # delta, the step size
    r"taps": 0,  # the convolution's weights
    r"widen": 1,  # in_proj; an exercise widens a Gaussian
    r"dice": 0,  # a generator
    r"vessels?": 1,  # chapter 4 begins with one
    r"surprise": 1,  # chapter 0 explains it
}


@pytest.mark.parametrize("word", WORDS)
def test_the_words_are_the_field_s(word):
    pages = [ROOT / "README.md", *ROOT.glob("book/*.md"), *ROOT.glob("notebooks/*.md")]
    code = [*ROOT.glob("irann/**/*.py"), *ROOT.glob("irann/**/*.c"), *ROOT.glob("tests/**/*.py")]
    found = [
        f"{file.relative_to(ROOT)}: {line}"
        for file in {*pages, *code} - {Path(__file__)}
        for line in file.read_text("utf-8").splitlines()
        if re.search(rf"(?<![\w-])(?:{word})(?![\w-])", line, re.IGNORECASE)
    ]
    assert len(found) == WORDS[word], found
