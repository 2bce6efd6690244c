"""What README and the first page tell a newcomer to type: every command and snippet of theirs runs,
with small recipes in the place of large ones.
"""

import importlib.util
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path, PureWindowsPath

import pytest

import irann
from irann import runs, zoo

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "book/intro.md")
PLAY = "Who is there?\nNay, answer me: stand, and unfold yourself.\n" * 60


def blocks(kind: str) -> list[str]:
    """-> the fenced blocks of a language ('' for none named), of both pages."""
    pages = "".join((ROOT / page).read_text() for page in PAGES)
    fenced = re.findall(r"^```(\S*)\n(.*?)^```$", pages, re.M | re.S)
    return [block for language, block in fenced if language == kind]


def commands() -> list[str]:
    lines = [line for kind in ("", "bash") for block in blocks(kind) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.partition("#")[0].split("&&")]
    return sorted({part for part in parts if re.match(r"(irann|pip|python) ", part)})


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A folder with a play and a trained run; demo means two steps of the tiny recipe."""
    tiny = {name: zoo.recipe(name, "tiny", steps=2) for name in zoo.MODELS}
    for name, entry in zoo.MODELS.items():
        monkeypatch.setitem(entry.recipes, "demo", tiny[name])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "play.txt").write_text(PLAY)
    for run, corpus in (("gpt-demo", PLAY), ("gpt-demo-play", PLAY)):
        text = irann.Text.of(corpus)
        config, recipe = zoo.recipe("gpt", "demo", vocabulary=len(text.vocabulary))
        list(irann.train(zoo.build("gpt", config), text, recipe, run=tmp_path / "runs" / run))
    return tmp_path


def test_the_pages_have_the_commands_that_a_newcomer_needs():
    told = " ".join(commands())
    for words in (
        "irann book",
        "irann chat gpt",
        "irann train gpt --corpus play.txt",
        "irann list",
    ):
        assert words in told
    assert len(commands()) > 12


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("irann ")])
def test_every_command_runs(line, quick, small, monkeypatch, command):
    opened = []
    monkeypatch.setattr(os, "execve", lambda *words: opened.append(words))
    monkeypatch.setattr("irann.bench.suite.main", lambda *_, **given: opened.append(given))
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    words = shlex.split(line)[1:]
    if words[0] == "--install-completion":  # it would change the shell of whoever tests
        assert "--install-completion" in command("--help")[1]
        return
    if words[0] == "eval":  # test_weights reads all of the validation part
        monkeypatch.setattr("irann.shakespeare.load", lambda: small)
    if words[0] == "train":  # another run of that name is there already
        words.append("--overwrite")
    code, out, err = command(*words)
    if "--log" in words and importlib.util.find_spec("tensorboard") is None:
        assert code == 2 and 'pip install "irann[log]"' in err
        return
    assert code == 0, (line, err)
    if words[0] in ("book", "bench"):
        assert len(opened) == 1
    elif words[0] != "chat":
        assert out


def test_what_pip_is_told_to_install_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pages = "".join((ROOT / page).read_text() for page in PAGES)
    told = set(re.findall(r'pip install -e "\.\[(\w+)\]"', pages))
    assert told == {"book", "log", "test"} and told <= set(extras)


def test_every_python_snippet_runs(quick, capsys):
    snippets = blocks("python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "a snippet", "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out
    assert irann.load("mine").vocabulary == irann.Text.of(PLAY).vocabulary
    assert (quick / "mine-transformers" / "config.json").is_file()


def test_pictures_and_links_of_the_readme_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            if "://" not in link:
                assert ((ROOT / page).parent / link).is_file(), (page, link)


def test_each_page_cites_this_version():
    pages = ((ROOT / page).read_text() for page in ("README.md", "book/licence.md"))
    cited = [re.findall(r"version\s*= \{(.*?)\}", page) for page in pages]
    assert cited == [[irann.__version__]] * 2


def test_binder_and_a_container_begin_as_the_readme_does():
    install = 'pip install -e ".[book]"'
    for name in (".binder/postBuild", ".devcontainer/devcontainer.json"):
        assert install in (ROOT / name).read_text().replace('\\"', '"'), name


def test_search_scores_all_that_sphinx_scores():
    """What is not named in our scorer would count as nothing at all."""
    sphinx = Path(importlib.util.find_spec("sphinx").origin).parent
    theirs = (sphinx / "themes/basic/static/searchtools.js").read_text().partition("Scorer = {")[2]
    names = re.findall(r"(?m)^    (\w+): ", theirs.partition("\n  };")[0])
    ours = (ROOT / "book/static/search.js").read_text()
    assert len(names) > 6 and all(f"  {name}: " in ours for name in names)


def test_training_ends_with_commands_that_there_are(monkeypatch):
    told = [line.split()[1] for line in runs.nexts(Path("runs/mine"))]
    assert told == ["sample", "chat", "eval", "plot", "export"]
    assert all("runs/mine" in line for line in runs.nexts(Path("runs/mine")))
    assert all(" 'my runs/mine' " in line for line in runs.nexts(Path("my runs/mine")))
    monkeypatch.setattr(sys, "platform", "win32")
    for run, typed in (("runs/mine", r" runs\mine "), ("my runs/mine", r' "my runs\mine" ')):
        assert all(typed in line for line in runs.nexts(PureWindowsPath(run)))
