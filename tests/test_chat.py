"""The conversation without a screen, then its screens: what is asked, what is said, what stays
after a stop.
"""

import asyncio
import io
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from html import escape
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
import torch
import wcwidth
from conftest import excite, small_disk
from helpers import model_of, rng

from irann import shakespeare, zoo
from irann.chat import streams
from irann.chat import terminal as in_terminal
from irann.chat.html import (
    draft_html,
    draft_view,
    inspection_html,
    note_of,
    progress,
    scene_html,
    stored_html,
)
from irann.chat.session import WHY, Frame, Inspection, Session, _keep, _speech_end, available
from irann.chat.streams import advance, cells, visible
from irann.chat.terminal import Pen, Terminal
from irann.chat.widget import Chat
from irann.lm import Draft, LanguageModel
from irann.settings import InputError, Setting
from irann.text import Text, Vocabulary
from irann.training import train

ENV = dict(os.environ)


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """A folder with a tiny trained run of every model under runs/."""
    folder = tmp_path_factory.mktemp("chat")
    for name in zoo.MODELS:
        config, recipe = zoo.recipe(name, "tiny", steps=3)
        list(train(zoo.build(name, config), small, recipe, run=folder / "runs" / f"{name}-tiny"))
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(zoo, "shipped", list)  # the tiny ones, whatever comes with the package
    return runs


class Parrot(LanguageModel):
    """Says what it was told to say: in `pages`, guesses first and settles later; it `fails` after
    so many characters.
    """

    def __init__(self, vocabulary, script: str, pages: bool = False, fails: int | None = None):
        super().__init__(SimpleNamespace(vocabulary=len(vocabulary), window=64))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocabulary = vocabulary
        self.script = script
        self.pages = pages
        self.fails = fails
        self.prompts = []

    def generate(self, prompt, n, *, temperature=1.0, top_k=None, top_p=None, generator=None):
        self.prompts.append(self.vocabulary.decode(prompt[0]))
        start = prompt.shape[1]
        ids = torch.cat([prompt, self.vocabulary.encode(self.script[:n])[None]], 1)
        yield Draft(prompt, start, forgotten=max(0, start - 64))
        for end in range(start + 1, ids.shape[1] + 1):
            if self.fails is not None and end - start > self.fails:
                raise RuntimeError("the model broke")
            yield Draft(ids if self.pages else ids[:, :end], end, {})


def parrot(corpus, script, **settings):
    return Session(Parrot(corpus.vocabulary, script, **settings))


def finish(frames):
    *_, last = frames
    return last


def talk(session, text):
    """Say something -> the last frame of the reply."""
    session.say(text)
    return finish(session.reply())


def knobs_of(widget):
    return {knob.description: knob for knob in widget.knobs.children}


def test_a_scene_is_written_as_the_plays_write_it_and_the_reply_ends_with_the_speech(corpus):
    session = parrot(corpus, "Good morrow,\ncousin.\n\nNURSE:\nMadam!")
    assert session.say("Who is there?") == ""
    last = finish(session.reply())
    assert session.model.prompts == ["ROMEO:\nWho is there?\n\nJULIET:\n"]
    assert last.text == "Good morrow,\ncousin." and last.settled == len(last.text)
    assert session.turns[-1].ended == "speech" and session.turns[-1].model
    talk(session, "Farewell.")
    assert session.model.prompts[1] == (
        "ROMEO:\nWho is there?\n\nJULIET:\nGood morrow,\ncousin.\n\nROMEO:\nFarewell.\n\nJULIET:\n"
    )


def test_where_a_speech_ends():
    assert _speech_end("Yes.\n\nNURSE") == 4
    assert _speech_end("Yes.\nNo.\n") is None
    assert _speech_end("\n\n\nYes.") is None
    assert _speech_end("\n\n Yes.\n\n") == 7
    assert _speech_end("") is None


def test_names_are_the_readers_choice(corpus):
    session = parrot(corpus, "Ay.\n\n")
    session.set("reader", "first witch: ")
    session.set("speaker", "Macbeth")
    talk(session, "When?")
    assert session.model.prompts[-1] == "FIRST WITCH:\nWhen?\n\nMACBETH:\n"
    assert session.set("speaker", "x" * 40) == "" and session.speaker == "X" * 40
    for bad in ("", " : ", "X" * 41):
        with pytest.raises(ValueError, match="a character's name"):
            session.set("reader", bad)


def test_a_name_in_characters_the_model_does_not_know_is_told_when_it_is_set(corpus, typed, capsys):
    heard, session = [], parrot(corpus, "Ay.")
    assert session.set("speaker", "Juli\u00e9t") == session.clean("\u00c9")[1] != ""
    assert session.set("speaker", "nurse") == ""
    Session(session.model, say=heard.append, reader="\u6731", speaker="nurse")
    assert heard == [session.clean("\u6731")[1]]
    typed("/to \u6731\u9e97\u8449")
    assert "'\u6731\u9e97\u8449': not among the 65 characters" in capsys.readouterr().err
    widget = Chat(session.model)
    knob = knobs_of(widget)["speaker"]
    knob.value = "\u6731"
    assert "\u6731" in widget.message.value
    knob.value = "nurse"
    assert widget.message.value == ""


def test_plain_mode_goes_on_with_the_text_itself_and_over_empty_lines(corpus):
    session = parrot(corpus, " be.\n\nThat is it.")
    session.set("mode", "plain")
    assert talk(session, "To be, or not to").text == " be.\n\nThat is it."
    assert session.scene() == "To be, or not to be.\n\nThat is it."
    assert session.model.prompts == ["To be, or not to"]
    assert session.turns[-1].ended == "length"
    session.say("\nAy.\n\n")  # here its line breaks are part of the text
    assert session.scene().endswith("That is it.\nAy.\n\n")
    session.set("mode", "play")  # where one empty line parts two speeches
    said = ["ROMEO:\nTo be, or not to", "JULIET:\n be.", "That is it.", "ROMEO:\nAy."]
    assert session.scene().split("\n\n") == said


def test_leaving_the_frames_is_a_stop_that_keeps_what_has_settled(corpus):
    session = parrot(corpus, "A long speech indeed.\n\n")
    session.say("Speak.")
    frames = session.reply()
    for frame in frames:
        if frame.settled == 6:
            break
    frames.close()
    assert session.turns[-1].text == "A long" and session.turns[-1].ended == "stopped"
    assert talk(session, "Go on.").text == "A long speech indeed."
    frames = session.reply()
    next(frames)
    count = len(session.turns)
    frames.close()
    assert len(session.turns) == count  # nothing had settled: nothing to keep


def test_a_page_shows_guesses_and_keeps_them_for_the_slider(corpus):
    session = parrot(corpus, "All at once.\n\nX", pages=True)
    session.say("How?")
    frames = list(session.reply())
    assert frames[1].text == "All at once.\n\nX" and frames[1].settled == 1
    turn = session.turns[-1]
    assert turn.text == "All at once." and turn.frames == tuple(frames[1:])
    long = parrot(corpus, "word " * 400, pages=True)
    long.set("length", 2000)
    frames = list(long.reply())
    assert len(long.turns[-1].frames) <= 400 and long.turns[-1].frames[-1] == frames[-1]


def test_of_more_than_400_frames_every_other_one_is_kept_and_always_both_ends():
    kept = []
    for i in range(1, 402):
        _keep(kept, Frame("a" * i, 0))
        if i == 400:
            assert [len(frame.text) for frame in kept] == list(range(1, 401))
    assert [len(frame.text) for frame in kept] == [*range(1, 401, 2), 401]


def test_a_model_that_breaks_leaves_the_scene_as_it_was(corpus):
    session = parrot(corpus, "Some words.\n\n", fails=3)
    session.say("Hm?")
    with pytest.raises(RuntimeError, match="broke"):
        finish(session.reply())
    assert [turn.text for turn in session.turns] == ["Hm?"]
    session.model.fails = None
    finish(session.reply())
    session.model.fails = 2
    with pytest.raises(RuntimeError):
        finish(session.again())
    assert [turn.text for turn in session.turns] == ["Hm?", "Some words."]
    session.clear()
    with pytest.raises(ValueError, match="no reply yet"):
        next(session.again())


def test_characters_it_does_not_know_are_named_and_replaced(corpus):
    session = parrot(corpus, "Ay.\n\n")
    note = session.say("Caf\u00e9 \u201cblack\u201d \U0001f600!")
    assert "\u00e9" in note and "65 characters" in note
    assert session.turns[0].text == "Cafe black !"
    assert session.say("Cafe\u0301") == session.say("Caf\u00e9")
    assert session.turns.pop() == session.turns.pop()
    assert session.say("\u2019tis <b>so</b> & ay\u2014now")
    assert session.turns[1].text == "'tis bsob & ay--now"
    finish(session.reply())
    session.clear()
    session.say("\U0001f600")
    assert session.turns == []
    finish(session.reply())
    assert session.model.prompts[-1] == "JULIET:\n"


def test_of_many_unknown_characters_the_first_twenty_are_named(corpus):
    session, greek = parrot(corpus, ""), "".join(map(chr, range(0x3B1, 0x3C6)))
    assert session.say(greek).startswith(repr(greek[:20] + "...") + ": not among")
    assert session.say(greek[:20]).startswith(repr(greek[:20]) + ": not among")


def test_accents_are_composed_first_and_taken_apart_only_if_they_must():
    for known, typed, heard in (
        ("caf\u00e9 ", "cafe\u0301 x", "caf\u00e9 "),
        ("cafe\u0301 ", "caf\u00e9 x", "cafe\u0301 "),
        ("\ud55c ", "\u1112\u1161\u11ab x", "\ud55c "),
        ("cafe \n", "cafe\u0301 \u3000\u00a0\r\n", "cafe   \n"),
        ("'\"- ", "\u2018\u2019\u201c\u201d\u2013\t\u2014", "''\"\"- --"),
    ):
        session = Session(Parrot(Vocabulary(known), ""))
        assert session.clean(typed)[0] == heard
        assert session.clean(heard) == (heard, "")


def test_it_says_what_it_forgot(corpus):
    session = parrot(corpus, "Ay.\n\n")
    talk(session, "word " * 40)
    lost = len(session.model.prompts[-1]) - 64
    assert (
        f"could not read the first {lost} characters of the scene: its window of 64"
        in session.forgot()
    )
    session.turns.append(replace(session.turns[-1], forgotten=0))  # as of a model without a window
    assert session.forgot() == ""


@pytest.mark.parametrize("said, length, lost", [(30, 3, 0), (30, 4, 17), (30, 40, 30), (0, 40, 0)])
def test_what_a_long_reply_pushed_out_of_the_window_is_forgotten_too(here, said, length, lost):
    # sees 32 characters, and keeps 16 of them when they are full
    session = Session("gpt", mode="plain", length=length)
    talk(session, "a" * said)
    assert session.turns[-1].forgotten == lost and bool(session.forgot()) == bool(lost)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_answers_with_a_seed_the_same(here, name):
    def talk():
        session = Session(name, seed=7, length=12, temperature="0.9")
        session.say("Hello")
        texts = [finish(session.reply()).text]
        for frame in session.again():
            assert frame.settled <= len(frame.text) <= 12
        return [*texts, session.turns[-1].text]

    first, second = talk(), talk()
    assert first == second and first[0] != first[1]
    session = Session(name)
    assert (
        f"{sum(p.numel() for p in session.model.parameters()):,} parameters" in session.describe()
    )
    assert ("at most" in session.describe()) == (not session.model.exact)
    assert "nats per character" in session.describe() and name in available()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_new_scene_and_a_seed_set_anew_begin_the_same_conversation_again(here, seed):
    session = Session("gpt", seed=seed, length=12)

    def talk():
        session.turns.clear()
        session.say("Hello")
        return [finish(session.reply()).text for _ in range(2)]

    first = talk()
    assert talk() != first
    session.clear()
    assert talk() == first
    session.set("seed", seed)
    assert talk() == first


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_shows_its_inside_on_the_text(here, name):
    session = Session(name, length=8)
    with pytest.raises(ValueError, match="nothing to inspect"):
        session.inspect()
    talk(session, "Hello there, gentle cousin, what news from the town?")
    look = session.inspect()
    assert len(look.text) == session.model.config.window
    for values in look.values.values():
        assert len(values) == len(look.text) and all(math.isfinite(v) for v in values)
    if session.model.exact:
        nats = session.model.nll(session.model.vocabulary.encode(look.text)[None])[0]
        assert look.values["nll"] == pytest.approx([0.0, *nats.tolist()], rel=1e-4)
    for rows in look.maps.values():
        assert torch.allclose(rows.sum(-1), torch.ones(len(look.text)), atol=1e-4)
    own = {"gpt": "attention", "mamba": "delta", "thinker": "rounds"}
    assert own.get(name, "nll") in look.values | look.maps


@pytest.mark.parametrize("axes", [(), (3,), (2, 3), (2, 2, 3)])
def test_maps_of_any_axes_become_layers_and_heads(here, axes, monkeypatch):
    session = Session("gpt", length=8)
    talk(session, "Hello")
    drawn = rng(0)
    maps = []

    def inspect(ids, **_):
        maps.append(torch.rand(*axes, ids.shape[1], ids.shape[1], generator=drawn))
        return {"looks": maps[-1], "none": torch.zeros(1, 1, 2, 3)}

    monkeypatch.setattr(session.model, "inspect", inspect)
    look = session.inspect()
    if not axes:  # one row a character and no heads: neither numbers nor maps
        assert not look.heads and not look.maps
        return
    t = len(look.text)
    wanted = maps[-1] if axes == (2, 3) else maps[-1].reshape(1, -1, t, t)
    assert torch.equal(look.heads["looks"], wanted) and look.heads.keys() == {"looks"}
    torch.testing.assert_close(look.maps["looks"], wanted.mean((0, 1)))


def test_the_inside_is_read_by_the_settings_of_the_model(here):
    session = Session("thinker", stop="fixed", rounds=5, temperature=0.5)
    excite(session.model, 0.2)
    session.say("Hello there, gentle cousin")
    text = session.model.vocabulary.encode(session.inspect().text)[None]
    for rounds in (5, 2):
        session.set("rounds", rounds)
        look = session.inspect()
        assert set(look.values["rounds"]) == {rounds}
        assert max(look.values["expected_rounds"]) < rounds + 1e-3
        assert look.values["nll"][1:] == pytest.approx(
            session.model.nll(text, stop="fixed", rounds=rounds)[0].tolist(), rel=1e-4
        )
    assert look.values["nll"][1:] != pytest.approx(session.model.nll(text)[0].tolist(), rel=1e-4)
    session.set("stop", "sampled")
    before, look = torch.get_rng_state(), session.inspect()
    assert look.values == session.inspect().values and torch.equal(torch.get_rng_state(), before)
    for name, own in (("diffusion", {}), ("thinker-page", {"stop": "fixed"})):
        session = Session(name, steps=3, **own)
        session.say("Hello there")
        assert set(session.inspect().values) == {"nll"}


def test_a_model_of_another_text_goes_on_with_what_one_writes():
    model = model_of("abc \n")
    told = []
    assert Session(model, say=told.append).mode == "plain" and "another text" in told[0]
    told.clear()
    assert Session(model, mode="play", say=told.append).mode == "play" and not told


def test_a_slash_command_keeps_the_letters_of_its_value(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    terminal = Terminal(parrot(corpus, "Ay."))
    terminal.session.say("Who is there?")
    assert terminal.command("SAVE My Scene.TXT") and terminal.command("Speaker  LADY Capulet ")
    assert (tmp_path / "My Scene.TXT").read_text() == terminal.session.scene() + "\n"
    assert terminal.session.speaker == "LADY CAPULET"
    terminal.command("Model Runs/Mine")
    assert "'Runs/Mine' is neither a model" in capsys.readouterr().err
    assert not terminal.command("QUIT")


def test_a_mode_that_was_chosen_stays_whatever_is_set_after_it():
    model = model_of("abc \n")
    session = Session("gpt")
    session.set("mode", "play")
    for name, value in (("seed", 3), ("temperature", 0.5), ("reader", "NURSE")):
        session.set(name, value)
    assert "mode" not in session.use(model) and session.mode == "play"


def test_a_mode_that_was_asked_for_is_not_said_to_be_another(monkeypatch, capsys):
    model = model_of("abc \n")
    assert "mode plain" in Chat(model).said
    asked = Chat(model, mode="play", length=7)
    assert asked.session.mode == "play" and asked.session.values["length"] == 7
    assert asked.said == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    in_terminal.main(model, {"mode": "play", "length": "7"})
    assert "mode plain" not in "".join(capsys.readouterr())
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    in_terminal.main(model, {})
    assert "mode plain" in "".join(capsys.readouterr())


def test_what_is_set_while_a_reply_is_written_counts_from_the_next_one(corpus):
    session = parrot(corpus, "Good morrow.\n\nNURSE:\nMadam!")
    frames = session.reply()
    frame = next(frames)
    session.set("mode", "plain")
    session.set("speaker", "nurse")
    assert "JULIET" in scene_html(session, frame) and "NURSE" not in scene_html(session, frame)
    finish(frames)
    turn = session.turns[-1]
    assert (turn.speaker, turn.text, turn.ended) == ("JULIET", "Good morrow.", "speech")
    frames = session.reply()
    session.set("mode", "play")
    finish(frames)
    turn = session.turns[-1]
    assert (turn.speaker, turn.ended) == ("", "length") and "Madam!" in turn.text
    spoken = re.findall(r"(?m)^(\w+):$", session.scene())  # as if said by those who speak now
    assert spoken[0] == "JULIET" and spoken[1] == "NURSE" and "None" not in spoken


def test_switching_the_model_keeps_the_scene_and_drops_what_the_new_one_does_not_have(here):
    session = Session("diffusion", steps=3, length=5, temperature=0.5)
    talk(session, "Hello")
    before = list(session.turns)
    assert session.use("gpt") == "gpt cannot take what was set for steps"
    assert session.turns == before and session.get("temperature") == 0.5
    finish(session.reply())
    with pytest.raises(ValueError, match="neither a model"):
        session.use("nobody")
    assert session.name == "gpt"


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("temperature", "nan", "temperature is a number from 0"),
        ("length", 10**9, "length is a whole number from 1"),
        ("seed", -3, "seed is a whole number"),
        ("steps", 4, "has no setting 'steps'; it has length, temperature, top_k, top_p, seed$"),
        ("mode", "opera", "mode is one of play, plain"),
    ],
)
def test_settings_out_of_range_are_named(corpus, name, value, words):
    with pytest.raises(ValueError, match=words):
        parrot(corpus, "Ay.").set(name, value)


def test_none_means_the_default_here_too(corpus):
    session = Session(Parrot(corpus.vocabulary, ""), top_k=None, temperature=0.5)
    session.set("temperature", None)
    assert session.get("top_k") == 0 and session.get("temperature") == 1 and not session.values
    for vocabulary, mode in ((corpus.vocabulary, "play"), (Vocabulary("Ay"), "plain")):
        said = []
        session = Session(Parrot(vocabulary, ""), reader=None, mode=None, say=said.append)
        assert (session.reader, session.mode) == ("ROMEO", mode)
        assert ("(mode plain)" in "".join(said)) == (mode == "plain")
        session.set("mode", {"play": "plain", "plain": "play"}[mode])
        session.set("speaker", "nurse")
        session.set_all({"mode": None, "speaker": None})
        assert (session.speaker, session.mode) == ("JULIET", mode)


def test_a_model_without_a_vocabulary_is_refused_and_seeds_never_run_out(corpus):
    with pytest.raises(ValueError, match="no vocabulary yet"):
        Session(zoo.build("gpt", zoo.recipe("gpt", "tiny")[0]))
    session = parrot(corpus, "Ay.\n\n")
    session.set("seed", 2**62)
    for _ in range(3):
        finish(session.reply())
    assert len(session.turns) == 3


def test_a_pipe_gets_the_replies_only(runs, monkeypatch, command):
    path = runs / "runs" / "gpt-tiny"
    session = Session(path, length=20, seed=3)
    session.say("Who is there?")
    reply = finish(session.reply()).text + "\n"
    help = ("has no setting 'nonsense'", "temperature: 0.0", "/save FILE")
    for typed, wanted, told in (
        ("Who is there?\n/nonsense\n/temp 0\n/help\n", reply, help),
        ("", "", ()),
        ("Who is there?", reply, ()),  # no line break at the end
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code, out, err = command("chat", path, "--length", 20, "--seed", 3)
        assert (code, out) == (0, wanted) and all(words in err for words in told)
        assert "\x1b" not in out


def test_a_pipe_that_is_not_text_is_refused_in_a_sentence(runs, monkeypatch, command):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = command("chat", runs / "runs" / "gpt-tiny")
    assert err.startswith("irann: what was said on standard input is not text")
    assert code == 2 and err.count("\n") == 1 and out == ""


@pytest.fixture
def typed(corpus, monkeypatch):
    """-> a function that types lines to a parrot -> what its session became."""

    def typed(*lines, script="Ay, madam.\n\n", **options):
        lines = iter(lines)
        terminal = Terminal(parrot(corpus, script, **options))
        monkeypatch.setattr(terminal, "typed", True)

        def answer(prompt):
            line = next(lines, None)
            if isinstance(line, type):
                raise line
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", answer)
        terminal.run()
        return terminal.session

    return typed


def test_slash_commands(typed, capsys, tmp_path):
    file = tmp_path / "scene.txt"
    session = typed(
        "/temp 0.5", "/topk 3", "/topp 0.9", "/length 50", "/seed 4", "/as nurse", "/to Romeo", "Hello", "/again", f"/save {file}",
        f"/save {file}", "/save", "/temp high", "/temp", "/model nobody", "/scene", "/quit", "never read",
    )  # fmt: skip
    assert session.values == {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "length": 50}
    assert session.seed == 4
    assert file.read_text() == "NURSE:\nHello\n\nROMEO:\nAy, madam.\n"
    assert len(session.model.prompts) == 2 and len(session.turns) == 2
    out, err = capsys.readouterr()
    assert out.count("Ay, madam.") == 3 and "is there already" in err and "takes the name" in err
    assert "temperature is a number" in err
    assert "temperature: 0.5" in err
    assert "neither a model" in err


def test_a_reply_that_cannot_be_has_no_heading(typed, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    typed("/to JULIET", "/again")
    out, err = capsys.readouterr()
    assert "there is no reply yet" in err and "JULIET:" not in out
    typed("/to JULIET", "Hello", "/again")
    assert capsys.readouterr().out.count("JULIET:") == 2


def test_an_interrupt_at_the_prompt_is_no_end_and_a_broken_file_name_neither(typed, capsys):
    broken = ("/save /nowhere/at/all", "/save ~nobody-lives-here/scene", f"/model {'m' * 300}")
    lines = (KeyboardInterrupt, *broken, "/mode plain", "Hello", "/clear", "/mode opera")
    session = typed(*lines, script="!")
    assert session.turns == [] and session.mode == "plain"
    out, err = capsys.readouterr()
    assert "Ctrl-D leaves" in out and "could not be written" in err and "mode is one of" in err


def test_an_interrupt_while_a_model_loads_is_no_end_either(typed, capsys, monkeypatch):
    def load(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "load", load)
    session = typed("Hello", "/model mamba", "Still there?")
    assert session.turns[2].text == "Still there?" and session.turns[3].text == "Ay, madam."
    assert "Ctrl-D leaves" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("/model mamba\n"))
    with pytest.raises(KeyboardInterrupt):  # nobody is there to be told
        Terminal(session).run()


def test_a_full_disk_leaves_no_half_scene_in_the_way(corpus, tmp_path):
    terminal, file = Terminal(parrot(corpus, "Ay.")), tmp_path / "scene.txt"
    terminal.session.say("word " * 5000)
    words = "scene.txt could not be written: File too large"
    with small_disk(20_000), pytest.raises(ValueError, match=words):
        terminal.save(str(file))
    terminal.save(str(file))
    assert file.read_text() == terminal.session.scene() + "\n"
    terminal.session.set("reader", "caf\udce9")  # a byte that is no text, from an old terminal
    terminal.session.say("Ay.")
    with pytest.raises(InputError, match="surrogates not allowed"):
        terminal.save(str(tmp_path / "other.txt"))
    assert not (tmp_path / "other.txt").exists()


def test_spaces_stay_spaces_and_controls_do_not_reach_the_terminal(typed, capsys):
    assert visible("a\x1b[2J\nb\x07\u2028") == "a\ufffd[2J\nb\ufffd\ufffd"
    assert visible("a\u200cb\u200d") == "a\u200cb\u200d"
    odd = "a\tb\u00a0c\u3000d\u200ce e\u0301"
    assert visible(odd) == odd and visible("a\tb", "  ") == "a  b" and visible("a\r\nb") == "a\nb"
    talker = Parrot(Vocabulary(odd + "\r\nX"), f"{odd}\r\n\r\nX")
    terminal = Terminal(Session(talker, mode="play"))
    terminal.answer(terminal.session.reply)
    assert capsys.readouterr().out == odd + "\n\n" and terminal.session.turns[-1].ended == "speech"
    terminal = Terminal(Session(Parrot(Vocabulary("a\x1b"), ""), mode="plain"))
    terminal.session.say("a\x1b")
    terminal.command("scene")
    assert capsys.readouterr().out == "a\ufffd\n"


def test_what_is_told_comes_after_what_was_written_and_moves_no_cursor(monkeypatch):
    both = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(both))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(both, "utf-8"))
    print("a reply")
    streams.tell("no \x1b[2J")
    assert both.getvalue().decode() == "a reply\nirann: no \ufffd[2J\n"
    assert streams.heard(lambda: "\ufeffROMEO:\n") == "ROMEO:\n"  # as some editors begin a file


def test_the_command_line_sets_what_slash_commands_set(corpus, monkeypatch, capsys):
    sessions = []
    monkeypatch.setattr(Terminal, "run", lambda terminal: sessions.append(terminal.session))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    words = {"temp": "0.5", "topk": "3", "to": "nurse", "as": "\u6731", "seed": "4"}
    in_terminal.main(Parrot(corpus.vocabulary, ""), words)
    (session,) = sessions
    assert session.values == {"temperature": 0.5, "top_k": 3} and session.seed == 4
    assert session.speaker == "NURSE" and "'\u6731': not among" in capsys.readouterr().err
    for name, value, words in (("length", "0", "is a whole number"), ("mode", "opera", "is one")):
        with pytest.raises(InputError, match=f"{name} {words}"):  # before anything is loaded
            in_terminal.main("nobody", {name: value})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    in_terminal.main(Parrot(Vocabulary("caf\u00e9"), ""), {})
    assert "standard output is ascii" in capsys.readouterr().err


@pytest.mark.parametrize(
    "env, live, painted",
    [
        ({"TERM": "xterm"}, True, "\x1b[1mAy\x1b[0m"),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, "Ay"),
        ({"TERM": "dumb"}, False, "Ay"),
    ],
)
def test_colours_are_for_terminals_that_have_them(corpus, monkeypatch, env, live, painted):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal = Terminal(parrot(corpus, ""))
    assert terminal.live == live and terminal.paint("Ay", "1") == painted


def test_the_prompt_is_the_reader_s_name_and_the_reply_stands_under_the_speaker_s(
    corpus, monkeypatch, capsys
):
    terminal, asked = Terminal(parrot(corpus, "Ay.\n\n")), []
    terminal.typed = terminal.live = True
    lines = iter(["Caf\u00e9", "/as nurse", "/mode plain", "Hello", "/quit", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or next(lines))
    terminal.run()
    out, err = capsys.readouterr()
    assert asked == ["ROMEO> ", "ROMEO> ", "NURSE> ", "> ", "> "]
    assert out.count("JULIET:\nAy.\n") == out.count("JULIET") == 1 and WHY["play"] in out
    assert "'\u00e9': not among" in err
    terminal.run()
    assert WHY["plain"] in capsys.readouterr().out


def test_a_line_from_a_pipe_keeps_its_spaces_and_no_line_end(corpus, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\r\n  two \n\nend", newline=""))
    terminal = Terminal(parrot(corpus, "!"))
    terminal.session.set("mode", "plain")
    terminal.run()
    assert [turn.text for turn in terminal.session.turns] == [
        "Hello",
        "!",
        "  two ",
        *"!!",
        "end",
        "!",
    ]
    assert capsys.readouterr().err == ""


def test_a_reply_that_cannot_be_is_told_to_who_types_and_ends_a_pipe(corpus, capsys):
    terminal = Terminal(parrot(corpus, "Ay."))
    with pytest.raises(InputError, match="no reply yet"):
        terminal.answer(terminal.session.again)
    terminal.typed = True
    terminal.answer(terminal.session.again)
    assert "no reply yet" in capsys.readouterr().err


@pytest.mark.parametrize("typed, times", [(False, 1), (True, 1), (True, 2)])
def test_one_interrupt_ends_the_step_a_second_ends_it_at_once(corpus, capsys, typed, times):
    terminal, steps = Terminal(parrot(corpus, "")), []
    own = partial(signal.default_int_handler)
    signal.signal(signal.SIGINT, own)

    def reply():
        for settled in (1, 2, 3):
            steps.append(settled)
            if settled == 2:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            yield Frame("Ay, ay", settled)

    terminal.typed = typed
    if typed:
        terminal.answer(reply)
    else:
        with pytest.raises(KeyboardInterrupt):
            terminal.answer(reply)
    assert steps == [1, 2]
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is own  # put back
    out = capsys.readouterr().out
    assert out.startswith("Ay" if times == 1 else "A\n") and ("[stopped]" in out) == typed


def test_a_reply_that_is_stopped_is_in_the_scene_before_more_is_said(corpus, capsys):
    terminal = Terminal(parrot(corpus, "Ay, madam."))
    terminal.typed = True
    terminal.session.say("word " * 40)

    def reply():
        for frame in terminal.session.reply():
            if frame.settled == 3:
                signal.raise_signal(signal.SIGINT)
            yield frame

    terminal.answer(reply)
    out, err = capsys.readouterr()
    assert terminal.session.turns[-1].text == "Ay," and "[stopped]" in out
    assert "could not read" in err  # of this reply, not of the one before


def test_a_terminal_tells_what_can_be_set_and_what_another_model_does_not_take(
    here, monkeypatch, capsys
):
    terminal = Terminal(Session("diffusion", steps=3))
    terminal.command("help")
    assert "\n  /steps N: " in capsys.readouterr().err
    terminal.command("mode")
    assert capsys.readouterr().err.endswith(
        "(a scene, or going on with the text itself; one of play, plain)\n"
    )
    model = terminal.session.model
    terminal.command("model")
    assert terminal.session.model is model
    assert capsys.readouterr().err == f"irann: {terminal.session.describe()}\n"
    terminal.forgetting = True
    terminal.command("model gpt")
    told = capsys.readouterr().err
    assert "gpt: 28,736 parameters" in told and "cannot take what was set for steps" in told
    assert not terminal.forgetting  # another window: what it forgets is told anew
    monkeypatch.setenv("HOME", str(here))
    terminal.command("save ~/scene.txt")
    assert (here / "scene.txt").read_text() == "\n"


def test_columns_are_those_of_the_screen():
    assert [cells(c) for c in "a\u4f60\uff01\U0001f600\u00e9"] == [1, 2, 2, 2, 1]
    assert [cells(c) for c in "\u0301\u20dd\u200d"] == [0, 0, 0]
    after = {"\u4f60": 20, "a\u4f60": 2, "a\nb": 1, "ab": 20, "abc": 1}
    assert {text: advance(18, text, 20) for text in after} == after


def test_proposals_leave_room_on_the_line_for_what_the_terminal_writes_at_ctrl_c():
    pen = Pen(live=True, colours=True)
    long = "so many words that no line holds them\nand more"
    for words, width in ((long, 1), ("\u4f60\u597d" * 20, 2)):
        for pen.column in range(21):
            tail = pen.tail(words, 20)
            room = max(0, 17 - pen.column)
            assert len(tail) == room // width and "\n" not in tail
    pen.column = 0
    assert pen.tail("\u0301x", 20) == "x"  # an accent would join what is written for good
    assert Pen(live=True, colours=False).tail("words", 20) == ""
    assert pen.tail("\x1b[2J\tx", 20) == "\ufffd[2J    x"  # a guess is obeyed no more than a reply


def screen(written, width):
    """-> the lines that a terminal shows, a list of cells each; the second cell of a wide character
    is empty.

    Beyond a line's last cell the cursor still stands on it, until something is written.
    """
    lines, x = [[]], 0
    for number, order, character in re.findall(r"(?s)\x1b\[(\d*)([KDm])|(.)", written):
        taken = wcwidth.wcwidth(character) if character else 0
        if order == "K":  # erase from the cursor on
            del lines[-1][min(x, width - 1) :]
        elif order == "D":  # to the left
            x = max(0, x - int(number))
        elif character == "\n" or (character and x + taken > width):
            lines.append([])
            x = 0
        if character not in ("", "\n") and not taken:
            lines[-1][x - 1] += character
        elif character not in ("", "\n"):
            lines[-1] += [" "] * (x - len(lines[-1]))
            lines[-1][x : x + taken] = [character, ""][:taken]
            x += taken
    return ["".join(line) for line in lines]


LATIN = "Ay, madam, all of it is true, every word.\n\nWho says it is not?\n" + "So be it. " * 6
WIDE = "\u4f60\u597d\uff0ce\u0301 " * 9 + "\n" + "\u4f60a" * 12


SCREENS = [(LATIN, "?!", 1, None), (LATIN, "?!", 5, None), (LATIN, "?!", 1, 30)]


@pytest.mark.parametrize("text, guess, stride, stop", [*SCREENS, (WIDE, "\u5417\uff01", 1, None)])
def test_proposals_are_written_over_and_leave_nothing_on_the_screen(
    corpus, monkeypatch, capsys, text, guess, stride, stop
):
    written = ""
    many, last = guess

    def reply():
        nonlocal written
        for settled in range(0, len(text), stride):
            proposed = (many * (settled % 7) + last + " ") * 9
            if settled == stop:
                signal.raise_signal(signal.SIGINT)
            yield Frame(text[:settled] + proposed, settled)
            written += capsys.readouterr().out
            line = screen(f"JULIET:\n{text[:settled]}", 20)[-1]
            shown = screen(written, 20)[-1]
            room = max(0, 17 - wcwidth.wcswidth(line))
            assert shown.startswith(line) and proposed.startswith(shown[len(line) :])
            assert 0 <= room - wcwidth.wcswidth(shown[len(line) :]) <= cells(many) - 1
        yield Frame(text, len(text))

    terminal = Terminal(parrot(corpus, ""))
    terminal.live = terminal.colours = terminal.typed = True
    monkeypatch.setattr(
        "irann.chat.terminal.shutil.get_terminal_size", lambda: os.terminal_size((20, 24))
    )
    terminal.answer(reply)
    written += capsys.readouterr().out
    end = "[stopped]\n" if stop else ""
    assert screen(written, 20) == screen(f"JULIET:\n{text[:stop]}\n{end}", 20)


def test_what_is_forgotten_is_said_once_in_a_scene(typed, capsys):
    typed("word " * 40, "And?", "/clear", "word " * 40, "And?")
    assert capsys.readouterr().err.count("could not read") == 2


def test_in_a_real_terminal_ctrl_c_stops_the_reply_and_not_the_session(runs):
    screen, child = pty.openpty()
    streams = {"stdin": child, "stdout": child, "stderr": child, "env": ENV | {"TERM": "xterm"}}
    command = [sys.executable, "-m", "irann", "chat", "runs/gpt-tiny"]
    command += ["--length", "100000", "--mode", "plain"]
    process = subprocess.Popen(command, cwd=runs, start_new_session=True, **streams)
    os.close(child)
    seen = ""

    def wait(words, since=0):
        nonlocal seen
        end = time.monotonic() + 60
        while words not in seen[since:]:
            assert time.monotonic() < end, seen[-2000:]
            if select.select([screen], [], [], 0.2)[0]:
                seen += os.read(screen, 4096).decode(errors="replace")
        return len(seen)

    try:
        wait("> ")
        os.write(screen, b"Hello\n")
        place = wait("Hello")
        while len(seen) < place + 200:
            wait("", 0)
            seen += os.read(screen, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        place = wait("[stopped]")
        wait("> ", place - 3)
        os.write(screen, b"/length 5\n")
        place = wait("length: 5 ")
        os.write(screen, b"More\n")
        wait("> ", place)
        os.write(screen, b"/quit\n")
        while True:
            try:
                if not os.read(screen, 4096):
                    break
            except OSError:  # the other end of the terminal is gone
                break
        assert process.wait(60) == 0 and "Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(screen)


@pytest.fixture
def chat(corpus):
    def chat(script, **options):
        widget = Chat(Parrot(corpus.vocabulary, script, **options))
        assert widget.session is not None
        return widget

    return chat


def test_without_a_loop_the_widget_answers_at_once_and_shows_a_transcript(chat):
    widget = chat("Ay, madam.\n\nX")
    widget.say("Who is there?")
    assert widget.session.turns[-1].text == "Ay, madam." and not widget.busy
    assert "Who is there?" in widget.scene.value and "Ay, madam." in widget.scene.value
    assert "Ay, madam." in widget._repr_html_() and widget.copy.value == widget.session.scene()
    widget.line.value = "And thou?"
    widget._entered(widget.line, {"event": "focus"}, [])
    assert len(widget.session.turns) == 2
    widget._entered(widget.line, {"event": "submit"}, [])
    assert len(widget.session.turns) == 4 and widget.line.value == ""
    widget.regenerate()
    assert len(widget.session.turns) == 4
    widget.begin()
    assert widget.session.turns == [] and "The stage is empty" in widget.scene.value
    widget.regenerate()
    assert "no reply yet" in widget.message.value and "irann-error" in widget.message.value
    widget.begin()
    assert widget.message.value == ""


def test_each_button_does_what_it_says_and_does_it_once(chat):
    widget = chat("Ay, madam.\n\n")
    buttons = {one.description: one for one in widget.children[5].children if hasattr(one, "click")}
    assert list(buttons) == ["Send", "Stop", "Regenerate", "Clear"]
    widget.line.value = "Who is there?"
    buttons["Send"].click()
    said = ["Who is there?", "Ay, madam."]
    assert [turn.text for turn in widget.session.turns] == said and widget.line.value == ""
    buttons["Regenerate"].click()
    assert [turn.text for turn in widget.session.turns] == said
    assert len(widget.session.model.prompts) == 2
    assert not widget.stopping and [one.disabled for one in buttons.values()] == [
        False,
        True,
        *[False] * 2,
    ]
    buttons["Stop"].click()
    assert widget.stopping
    buttons["Clear"].click()
    assert widget.session.turns == [] and len(widget.session.model.prompts) == 2


def test_what_was_forgotten_is_said_beside_another_note(chat):
    widget = chat("Ay.\n\n")
    widget.say("word " * 40 + "\U0001f600")
    assert "not among" in widget.message.value and widget.message.value.count("could not read") == 1
    widget.regenerate()
    assert "not among" not in widget.message.value
    assert widget.message.value.count("could not read") == 1


def test_a_chat_in_plain_python_is_a_sentence(here, monkeypatch, capsys):
    assert re.fullmatch(
        r"gpt: 28,736 parameters, .*; a chat for a notebook cell; .*", repr(Chat("gpt"))
    )
    capsys.readouterr()
    widget = Chat("gtp")
    assert repr(widget).startswith("a chat without a model: 'gtp' is neither a model")
    assert "neither a model" in widget._repr_html_()  # for a page without widgets
    assert capsys.readouterr().err == f"irann: {widget.said}\n"
    shell = SimpleNamespace(kernel=SimpleNamespace())  # a reader sees the widget
    monkeypatch.setattr("irann.chat.widget.get_ipython", lambda: shell)
    assert "neither a model" in Chat("gtp").said and capsys.readouterr().err == ""


def test_bubbles_say_which_model_wrote_them(here):
    widget = Chat("gpt", length=4)
    widget.say("Hm?")
    widget.names.value = "mamba"
    widget.say("Hm?")
    names = re.findall("irann-name'>([^<]*)<", widget.scene.value)
    assert names == ["ROMEO", "JULIET \u00b7 gpt", "ROMEO", "JULIET \u00b7 mamba"]
    kinds = re.findall(r"irann-turn irann-(\w+)", widget.scene.value)
    assert kinds == ["reader", "model", "reader", "model"]
    assert widget.scene.value.count("cut at its length") == 2


def test_a_training_elsewhere_is_not_disturbed_by_a_chat(small):
    config, recipe = zoo.recipe("gpt", "tiny", steps=40, evaluate_every=0, dropout=0.2)

    def losses(talk):
        model, got = zoo.build("gpt", config), []
        model.vocabulary = small.vocabulary
        widget = Chat(model, length=20)
        ticks = train(model, small, recipe)
        thread = threading.Thread(target=lambda: got.extend(tick.loss for tick in ticks))
        thread.start()
        while talk and thread.is_alive():
            widget.say("Who is there?")
            widget.inspect()
            assert widget.said == ""
        thread.join()
        return got

    assert losses(True) == losses(False)


def test_a_very_long_scene_shows_its_end(chat):
    widget = chat("")
    widget.session.say("word " * 6000 + "THE & END")
    shown = scene_html(widget.session)
    assert "... " in shown and "THE &amp; END" in shown and 20_000 < len(shown) < 21_000
    widget.session.turns[-1] = replace(widget.session.turns[-1], text="'" * 20_001, ended="stopped")
    shown = scene_html(widget.session)
    assert shown.count("x27;") == shown.count("&#x27;") == 20_000  # no sign is cut in two
    assert "stopped" in shown
    widget.session.clear()
    for letter in "XYZ":
        widget.session.say(letter * 15_000)
    shown = scene_html(widget.session)
    assert [shown.count(letter) for letter in "XYZ"] == [0, 5000, 15_000]
    for size, settled in ((15_000, 14_000), (30_000, 29_000), (30_000, 1)):
        shown = scene_html(widget.session, Frame("V" * settled + "W" * (size - settled), settled))
        open_part = shown.split("<span class='irann-open'>")[1]
        assert open_part.count("W") == shown.count("W") == min(20_000, size - settled)
        assert shown.count("V") + shown.count("W") + shown.count("Z") == 20_000
        assert shown.count("...") == 1 and not shown.count("Y")


def test_stop_works_while_the_model_writes(chat, monkeypatch):
    monkeypatch.setattr("irann.chat.widget.EVERY", 0.0)
    widget = chat("A speech that never ends " * 10)

    async def scene():
        widget.say("Speak.")
        assert widget.busy
        await asyncio.sleep(0)
        assert widget.submit.disabled and not widget.stop.disabled
        widget.line.value = "later"
        widget.say()
        assert widget.line.value == "later" and widget.message.value == ""
        widget.say("not now")
        assert "not heard" in widget.message.value
        task = widget.task
        widget.regenerate()
        widget.begin()
        assert widget.session.turns[0].text == "Speak." and widget.names.disabled
        assert widget.task is task
        seen = [widget.scene.value]
        for _ in range(6):
            await asyncio.sleep(0)
            seen.append(widget.scene.value)
        assert len(set(seen)) > 4
        widget.stop.click()
        await widget.task

    asyncio.run(scene())
    turn = widget.session.turns[-1]
    assert turn.ended == "stopped" and 0 < len(turn.text) < 20 and len(widget.session.turns) == 2
    assert not widget.submit.disabled and widget.stop.disabled and "stopped" in widget.scene.value
    assert not widget.names.disabled
    widget.say("Go on.")
    assert len(widget.session.turns) == 4


def test_of_a_reply_that_has_ended_the_settled_characters_and_the_seconds_are_said(
    chat, monkeypatch
):
    widget, now = chat(""), [100.0]
    monkeypatch.setattr("irann.chat.widget.time", SimpleNamespace(monotonic=lambda: now[-1]))

    def reply():
        for settled in (0, 3):
            yield Frame("abcdefgh", settled)
            now.append(now[-1] + 2)

    for _ in range(2):
        widget._answer(reply)
        assert "3 characters in 4.0 s" in widget.timing.value


def test_what_a_page_has_stored_beside_the_widget_keeps_up_with_the_scene(chat, monkeypatch):
    stored = []
    shown = SimpleNamespace(update=lambda bundle, raw: stored.append(bundle["text/html"]))
    monkeypatch.setattr("irann.chat.widget.updatable_output", lambda bundle: shown)
    widget = chat("Ay, madam.\n\n")
    widget._repr_mimebundle_()
    widget.say("<Who>")
    assert stored[-1] == stored_html(widget.session.scene()) and "Ay, madam." in stored[-1]
    widget.begin()
    assert stored[-1] == stored_html("")


def test_redraws_are_throttled(chat, monkeypatch):
    widget, drawn = chat("word " * 60), []
    original = widget._draw
    monkeypatch.setattr(widget, "_draw", lambda: (drawn.append(1), original()))
    begin = time.monotonic()
    widget.say("Speak.")
    assert len(drawn) <= (time.monotonic() - begin) / 0.08 + 2


EVIL = "<img src=x onerror=alert(1)> & '\"</div>"


def test_markup_stays_text_everywhere():
    vocabulary = Vocabulary(EVIL + "ABCDEFGHIJKLMNOPQRSTUVWXYZ:\n abcdefghijklmnopqrstuvwxyz")
    for pages in (False, True):
        widget = Chat(Parrot(vocabulary, EVIL, pages=pages), mode="play", reader="<b>&")
        widget.say(EVIL)
        widget._tell(EVIL, error=True)
        numbers = {"nll": [float(i) for i in range(len(EVIL))]}
        heads = {"attention": torch.eye(len(EVIL))[None, None]}
        look = Inspection(EVIL, numbers, heads, likely=[[("<", 0.5)]] * len(EVIL))
        page = widget.scene.value + widget.drafts.value + widget.message.value
        for inside in (inspection_html(look, "nll"), inspection_html(look, "attention", 2)):
            page += inside
            letters = re.findall("<span title=[^>]*>(.*?)</span>", inside)
            assert "".join(letters) == escape(EVIL) and ": &lt; 50%" in inside
        page += progress(EVIL) + stored_html(EVIL)
        assert "<img" not in page
        assert "<b>" not in page.lower() and "&lt;B&gt;&amp;</div>" in page
        assert "&lt;img src=x onerror=alert(1)&gt;" in page
        assert page.count("</div>") == page.count("<div")
        frame = draft_html(Frame(EVIL, 4))
        proposed = " src=x onerror=alert(1)&gt; &amp; &#x27;&quot;&lt;/div&gt;"
        assert frame == f"&lt;img<span class='irann-open'>{proposed}</span>"


def test_markup_stays_text_in_the_book(tmp_path):
    """A chapter whose stored outputs hold what a reader and a model said: printed, as a transcript,
    and as the chat leaves it.
    """
    from sphinx.application import Sphinx

    widget = Chat(
        Parrot(Vocabulary(EVIL + "ABCDEFGHIJKLMNOPQRSTUVWXYZ:\n abcdefghijklmnopqrstuvwxyz"), EVIL)
    )
    widget.say(EVIL)
    stored = {"text/plain": widget.session.scene(), "text/html": widget._repr_html_()}
    outputs = [
        nbformat.v4.new_output("stream", text=widget.session.scene()),
        nbformat.v4.new_output("display_data", data=stored),
        nbformat.v4.new_output("execute_result", data={"text/plain": repr(EVIL)}),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("# A chapter"),
        nbformat.v4.new_code_cell("chat", outputs=outputs, execution_count=1),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "chapter.ipynb")
    how = {"extensions": ["myst_nb"], "nb_execution_mode": "off", "root_doc": "chapter"}
    out = tmp_path / "html"
    Sphinx(tmp_path, None, out, tmp_path / "read", "html", how, status=None).build()
    page = (out / "chapter.html").read_text()
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 5
    assert not re.search(r"<img[^>]*onerror", page)


def test_a_page_at_once_leaves_its_drafts_on_a_slider(chat):
    widget = chat("All at once.\n\nX", pages=True)
    widget.say("How?")
    assert widget.slide.max == len(widget.session.turns[-1].frames) - 1 > 3
    assert widget.slide.value == widget.film.max == widget.slide.max  # where it ended
    widget.slide.value = 0
    assert "<span class='irann-open'>ll at once." in widget.drafts.value
    widget.slide.value = widget.slide.max
    assert "irann-open" not in widget.drafts.value and "All at once." in widget.drafts.value
    assert "noise level 7</span>" in draft_view(Frame("Ay", 0, {"level": 7}))
    widget.begin()
    assert "leave their drafts here" in widget.drafts.value and widget.slide.max == 0


def test_a_model_that_refuses_before_it_writes_leaves_the_buttons_alive(chat, monkeypatch, capsys):
    widget = chat("Some words.\n\n")
    monkeypatch.setattr(Parrot, "generate", LanguageModel.generate)
    widget.say("Hm?")
    assert "NotImplementedError" in widget.message.value and widget.stop.disabled
    assert not widget.submit.disabled and widget.timing.value == ""
    assert "Traceback" in capsys.readouterr().err


def test_an_inside_that_fails_leaves_the_buttons_alive(chat, capsys):
    widget = chat("Ay.\n\n")  # a parrot has no nll
    widget.more.selected_index = 1
    widget.say("Hm?")
    assert "Ay." in widget.scene.value and not widget.submit.disabled and widget.stop.disabled
    assert "NotImplementedError" in widget.message.value and widget.view.value == ""
    assert "Traceback" in capsys.readouterr().err


def test_errors_are_shown_in_the_widget(chat, tmp_path, monkeypatch, capsys):
    widget = chat("Some words.\n\n", fails=3)
    widget.say("Hm?")
    assert "RuntimeError: the model broke" in widget.message.value and not widget.submit.disabled
    assert "Traceback" in capsys.readouterr().err  # a fault of a program, not of the reader
    knobs_of(widget)["top_k"].value = -4
    assert "top_k is a whole number from 0" in widget.message.value
    assert widget.session.get("top_k") == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "shipped", list)
    assert available() == []
    empty = Chat()
    assert "irann train gpt --recipe demo" in empty.message.value and empty.submit.disabled
    empty.say("Hello?")


def test_a_knob_shows_what_is_set(chat):
    widget = chat("Ay.\n\n")
    knobs = knobs_of(widget)
    knobs["seed"].value = " 7 "
    widget.say("Hm?")
    refused = [
        ("length", 0, "length is a whole", 300),
        ("seed", "-3", "seed is a whole", "7"),
        ("reader", ":", "name has 1", "ROMEO"),
    ]
    for name, value, words, shown in refused:
        knobs[name].value = value
        assert knobs[name].value == shown and words in widget.message.value
    assert widget.session.asked == 1 and widget.session.seed == 7  # refused: the seed goes on
    knobs["seed"].value = " "
    assert widget.session.seed is None and widget.message.value == ""
    knobs["seed"].value = "0"
    assert knobs["seed"].value == "0" and widget.session.seed == 0
    knobs["reader"].value = "first witch: "
    assert knobs["reader"].value == widget.session.reader == "FIRST WITCH"
    assert widget.message.value == ""
    knobs["length"].value = 50
    assert knobs["length"].value == widget.session.get("length") == 50
    assert type(knobs["length"].value) is type(knobs["top_k"].value) is int
    bold = Chat(widget.session.model, temperature=5)
    slider = knobs_of(bold)["temperature"]
    assert slider.value == slider.max == 5 and bold.session.get("temperature") == 5
    assert knobs["temperature"].max == 2 and knobs_of(bold)["top_p"].max == 1


def test_a_setting_that_may_be_none_has_a_line_of_text(chat, monkeypatch):
    monkeypatch.setattr(Parrot, "settings", {"beam": Setting(None, "how wide", low=1, kind=int)})
    widget = chat("Ay.")
    knob = knobs_of(widget)["beam"]
    for said, beam in (("5", 5), (" 6 ", 6), ("", None), ("7", 7)):
        knob.value = said
        assert widget.session.get("beam") == beam and widget.message.value == ""
        assert knob.value == said.strip()
    assert knobs_of(Chat(widget.session.model, beam=5))["beam"].value == "5"


def test_an_empty_stage_keeps_up_with_model_and_mode(here):
    widget = Chat("runs/nope")
    assert widget.scene.value == ""
    widget.names.value = "gpt"
    assert WHY["play"] in widget.scene.value
    other = model_of("abc \n")
    widget = Chat(other)
    for model, mode in (("gpt", "play"), (other, "plain")):
        widget.names.value = model
        assert WHY[mode] in widget.scene.value
    knobs_of(widget)["mode"].value = "play"
    assert WHY["play"] in widget.scene.value


def test_a_model_that_could_not_be_loaded_hands_its_settings_to_the_one_that_can(here, monkeypatch):
    widget = Chat("runs/nope", seed=5, temperature=0.7)
    assert "neither a model" in widget.message.value and widget.session is None
    widget.names.value = "gpt"
    assert widget.session.seed == 5
    assert widget.session.get("temperature") == 0.7
    assert widget.message.value == ""
    widget.names.value = "runs/nope"
    assert "neither a model" in widget.message.value and widget.names.value == "gpt"
    monkeypatch.chdir("runs/gpt-tiny")
    widget = Chat("gpt", length=7)
    assert "irann train gpt" in widget.message.value
    monkeypatch.chdir(here)
    widget.names.value = "gpt"  # trained meanwhile
    assert widget.session.get("length") == 7 and widget.names.value == "gpt"
    for refused, words in (({"temperature": -1}, "temperature is a"), ({"seed": -1}, "seed is a")):
        widget = Chat("gpt", **refused)
        assert words in widget.message.value and widget.session is None
        widget.names.value = "gpt"
        assert widget.session.get("temperature") == 1 and widget.message.value == ""
    widget = Chat("x" * 300)
    assert "cannot be read (File name too long)" in widget.message.value and widget.session is None


def test_the_widget_with_every_model(here):
    widget = Chat("gpt", length=6, seed=1)
    for name in zoo.MODELS:
        widget.names.value = name
        assert "parameters" in widget.about.value and widget.message.value == ""
        widget.say("Hello there, gentle cousin")
        widget.inspect()
        assert "irann-text-view" in widget.view.value and widget.kind.value == "nll"
        for kind in widget.kind.options:
            widget.kind.value = kind
            assert kind in widget.view.value
        widget.kind.value = "nll"
        descriptions = [k.description for k in widget.knobs.children]
        assert set(widget.session.model.settings) <= set(descriptions)
        assert "temperature" in descriptions
    assert sum(not turn.model for turn in widget.session.turns) == len(zoo.MODELS)


def test_a_page_without_widgets_shows_the_transcript(chat):
    widget = chat("Ay, madam.\n\n")

    async def cell():  # a cell runs inside a loop, and nbconvert does not wait for tasks
        widget.say("Who is there?", wait=True)
        bundle = widget._repr_mimebundle_()
        assert "Ay, madam." in bundle["text/html"]
        assert "application/vnd.jupyter.widget-view+json" in bundle
        widget._entered(widget.line, {"event": "submit"}, [])
        widget.line.value = "typed fast"
        await asyncio.sleep(0.3)
        await widget.task

    asyncio.run(cell())
    assert widget.session.turns[2].text == "typed fast" and len(widget.session.turns) == 4


def test_loading_and_writing_show_how_far_they_are(here, monkeypatch):
    monkeypatch.setattr("irann.chat.widget.EVERY", 0.0)
    widget, load, seen = Chat("gpt", length=6, mode="plain"), zoo.load, []

    def loading(*args, say, **settings):
        seen.append(widget.about.value)
        say("step-2 was skipped: it is damaged")
        return load(*args, say=say, **settings)

    monkeypatch.setattr(zoo, "load", loading)
    widget.names.value = "mamba"
    assert "<progress>" in seen[0] and "loading mamba" in seen[0]
    assert "progress" not in widget.about.value and "parameters" in widget.about.value
    assert "step-2 was skipped" in widget.message.value
    timings = []
    widget.timing.observe(lambda change: timings.append(change["new"]), "value")
    widget.say("Speak.")
    assert any(
        "<progress value=3 max=6>" in timing and "3 characters, step size " in timing
        for timing in timings
    )
    assert "6 characters in " in timings[-1] and "progress" not in timings[-1]
    monkeypatch.setattr(zoo, "load", load)
    widget.names.value = "gpt"
    assert widget.message.value == ""  # what loading another one had to say was said then


def test_the_note_beside_a_draft_is_its_numbers():
    note = {
        "level": 1000,
        "sure": 0.91666,
        "rounds": [3],
        "many": [0.5, 0.2],
        "word": "<b>",
        "x": 2,
    }
    words = "noise level 1,000, mean probability of its guesses 0.917, rounds of thinking 3, x 2"
    assert note_of(Frame("Ay", 1, note)) == words


def test_an_open_inside_keeps_up_with_the_scene_and_the_model(here):
    widget = Chat("gpt", length=8, seed=1)
    widget.more.selected_index = 1
    assert "say something first" in widget.view.value
    widget.say("Hello there, gentle cousin")
    first = widget.view.value
    assert "nats that each character cost" in first
    assert "at most" not in first
    assert widget.layer.layout.display == "none"
    widget.kind.value = "attention"
    assert widget.layer.layout.display == ""
    assert "attention weights of the framed character" in widget.view.value
    widget.say("What news from the town?")
    assert widget.view.value != first and widget.kind.value == "attention"
    widget.names.value = "diffusion"
    assert widget.kind.options == ("nll",) and "at most" in widget.view.value
    assert widget.position.layout.display == "none"  # nothing to aim: it has no next character
    widget.more.selected_index = None
    stale = widget.view.value
    widget.say("And then?")
    assert widget.view.value == stale  # nobody looks: nothing is computed
    widget.more.selected_index = 1
    assert "And then?" in widget.session.scene() and widget.inspected is not None
    widget.begin()
    assert "say something first" in widget.view.value and widget.inspected is None


def test_an_open_inside_keeps_up_with_the_settings_of_the_model(here):
    widget = Chat("thinker", length=4, seed=1)
    widget.say("Hello there")
    widget.more.selected_index = 1
    widget.kind.value = "rounds"
    before = widget.inspected.values["rounds"]
    knobs_of(widget)["threshold"].value = 0.0
    assert widget.inspected.values["rounds"] != before == [*before]
    seen = widget.inspected
    knobs_of(widget)["temperature"].value = 0.5  # the draw's: nothing is computed
    assert widget.inspected is seen

    async def scene():
        widget.say("More")
        await asyncio.sleep(0)
        knobs_of(widget)["threshold"].value = 1.0  # nor while a reply is written
        assert widget.busy and widget.inspected is seen
        await widget.task

    asyncio.run(scene())
    assert "More" in widget.inspected.text and widget.inspected.values["rounds"] != seen


def test_the_inside_is_aimed_at_a_character_a_layer_and_a_head(here, monkeypatch):
    widget = Chat("gpt", length=8, seed=1)
    widget.say("Hello there, gentle cousin")
    widget.more.selected_index = 1
    session, shown = widget.session, widget.inspected
    ids = session.model.vocabulary.encode(shown.text)[None]
    attention = session.model.inspect(ids)["attention"]
    assert widget.layer.options == (("all", -1), ("1", 0), ("2", 1)) == widget.head.options
    torch.testing.assert_close(shown.map("attention", 1, 0), attention[1, 0])
    torch.testing.assert_close(shown.map("attention", head=1), attention[:, 1].mean(0))
    with pytest.raises(IndexError):  # not NaN, the mean of nothing
        shown.map("attention", 99)
    torch.testing.assert_close(shown.maps["attention"], attention.mean((0, 1)))
    p = session.model(ids)[0, 7].softmax(-1)
    likeliest, value = shown.likely[7][0]
    assert widget.position.value == widget.position.max == len(shown.text) - 1
    assert widget.position.layout.display == ""
    assert likeliest == session.model.vocabulary.decode([p.argmax()])
    assert abs(value - p.max()) < 1e-6
    widget.picked.value = "7"  # what a click writes there
    assert widget.position.value == 7 and widget.picked.value == ""
    framed = shown.text[7].replace(" ", "\u2423")
    assert f"after the framed {framed}" in widget.view.value
    widget.kind.value = "attention"
    widget.layer.value, widget.head.value = 1, 0
    assert "layer 2, head 1" in widget.view.value
    titles = [float(number) for number in re.findall("title='(.*?)'", widget.view.value)]
    assert titles == pytest.approx(attention[1, 0, 7].tolist(), abs=6e-4)
    widget.picked.value = "what is no number"
    assert widget.position.value == 7 and widget.picked.value == ""
    widget.picked.value = "9999"
    assert widget.position.value == widget.position.max
    square = torch.eye(len(shown.text))
    deep = {"attention": square.expand(3, 1, *square.shape), "one": square.expand(1, 1, -1, -1)}
    monkeypatch.setattr(session.model, "inspect", lambda ids, **_: deep)
    widget.inspect()
    assert [len(aim.options) for aim in (widget.layer, widget.head)] == [4, 2]  # and "all"
    widget.layer.value = 2
    widget.kind.value = "one"
    assert "all layers" in widget.view.value and "nan" not in widget.view.value


def test_a_model_of_another_text_goes_on_with_it(here):
    text = Text.of("\u03b1\u03b2\u03b3 " * 200)
    config, recipe = zoo.recipe("gpt", "tiny", steps=1, vocabulary=4)
    model = zoo.build("gpt", config)
    model.vocabulary = text.vocabulary
    heard = []
    session = Session(model, say=heard.append, length=5)
    assert session.mode == "plain" and "trained on another text" in heard[0]
    session.say("\u03b1\u03b2")
    finish(session.reply())
    assert "ROMEO" not in session.scene() and session.scene().startswith("\u03b1\u03b2")
    assert re.findall("irann-name'>([^<]*)<", scene_html(session)) == ["you", "GPT"]
    assert Session(model, mode="play").mode == "play"
    session = Session("gpt")
    assert session.mode == "play"
    assert "goes on" in session.use(model) and session.mode == "plain"
    assert session.use("gpt") == "" and session.mode == "play"
    session.set("mode", "plain")
    session.use("gpt")
    assert session.mode == "plain"  # the reader's choice


def test_runs_are_among_the_models_of_the_chat(here):
    assert "runs/gpt-tiny" in [label for label, _ in Chat("gpt").names.options]
    widget = Chat("runs/gpt-tiny")
    assert widget.names.value == "runs/gpt-tiny" and widget.session.name == "runs/gpt-tiny"


def test_without_a_name_the_first_model_that_has_weights_talks(here, monkeypatch):
    monkeypatch.setattr("irann.chat.widget.available", lambda: ["mamba", "gpt"])
    widget = Chat()
    assert widget.session.name == widget.names.value == "mamba"


def test_of_a_model_of_ones_own_the_list_shows_its_class(chat):
    widget = chat("Ay.")
    assert widget.names.label == "Parrot" and widget.names.value is widget.session.model
    assert [label for label, _ in widget.names.options][1:6] == [*zoo.MODELS]


def test_a_model_chosen_while_a_reply_is_written_ends_it(chat, here):
    widget = chat("A speech that never ends " * 10)

    async def scene():
        widget.say("Speak.")
        await asyncio.sleep(0)
        widget.names.value = "gpt"
        await widget.task

    asyncio.run(scene())
    assert widget.session.turns[-1].ended == "stopped" and widget.session.name == "gpt"


def test_a_page_that_is_written_after_another_begins_at_nothing(chat, monkeypatch):
    monkeypatch.setattr("irann.chat.widget.EVERY", 0.0)
    widget, timings = chat(""), []
    widget.timing.observe(lambda change: timings.append(change["new"]), "value")
    for noise in ((80, 40), (40, 10)):
        timings.clear()
        frames = (Frame("abcdefgh", 0, {"level": level}) for level in noise)
        widget._answer(lambda frames=frames: frames)
        done = [re.search("value=(.*?) ", timing) for timing in timings]
        assert int([one for one in done if one][0][1]) == 0


def test_a_page_shows_how_far_it_is_while_nothing_has_settled(chat):
    widget = chat("x")
    prompt = Frame("", 0)
    first = [Frame("abcdefghij", 0, {"level": level}) for level in (80, 40, 8)]
    assert [widget._done(frame) for frame in (prompt, *first)] == [0, 0, 5, 9]
    second = [Frame("abcdefghij" * 2, 10, {"level": level}) for level in (80, 40)]
    assert [widget._done(frame) for frame in second] == [10, 15]
    widget.first = None
    masked = [Frame("abcdefghij", *seen) for seen in ((4, {"masked": 6}), (5, {"masked": 3}))]
    assert [widget._done(frame) for frame in (prompt, *masked)] == [0, 4, 7]
    assert widget._done(Frame("abcdefghij", 9, {"masked": 2})) == 9
    assert widget._done(Frame("abc", 3)) == 3


def test_a_map_is_coloured_by_what_comes_before_the_character():
    rows = torch.tensor(
        [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.3, 0.6, 0], [0.1, 0.1, 0.2, 0.6]]
    )
    page = inspection_html(Inspection("abcd", {}, {"attention": rows[None, None]}), "attention", 2)
    shades = [float(part.split(")")[0]) for part in page.split("rgba(230,159,0,")[1:]]
    assert "from 0.10 (plain) to 0.30 (orange); all layers, all heads" in page
    inks = [";color:" in part for part in page.split("<span")[1:5]]
    assert inks == [False, True, True, False]  # dark on orange, whatever the page's theme
    # b is the strongest before c; c itself is no measure, and d is not seen
    assert shades == [0.0, 1.0, 1.0, 0.0]
    assert [part.split(">")[1][0] for part in page.split("<span")[1:] if "outline" in part] == ["c"]
    assert "at most" in inspection_html(Inspection("ab", {"nll": [0.0, 1.0]}, exact=False), "nll")


def test_each_character_has_its_number_and_below_them_stand_range_and_what_may_follow():
    likely = [[("x", 0.5)], [("y", 0.5)], [("\n", 0.254), (" ", 0.006)]]
    look = Inspection("a\n ", {"nll": [0.0, 1.0, 4.0]}, likely=likely)
    page = inspection_html(look, "nll")
    shown = re.findall(r"title='(.*?)' style='background:rgba\(230,159,0,(.*?)\).*?>([^<]*)<", page)
    assert shown == [("0.000", "0.00", "a"), ("1.000", "0.25", "\u21b5\n"), ("4.000", "1.00", " ")]
    assert "from 0.00 (plain) to 4.00 (orange)" in page and page.count("outline") == 1
    assert "after the framed \u2423 (click another): \u21b5 25%, \u2423 1%" in page
    level = inspection_html(Inspection("ab", {"rounds": [3.0, 3.0]}), "rounds")
    assert level.count("rgba(230,159,0,0.00)") == 2 and "outline" not in level


def test_an_empty_stage_says_what_may_be_expected_of_the_mode(corpus):
    for mode in ("play", "plain"):
        page = scene_html(Session(Parrot(corpus.vocabulary, ""), mode=mode))
        assert f"The stage is empty. {WHY[mode]}" in page


def test_where_cells_cannot_ask_the_chat_is_a_transcript_and_waits_for_its_replies(
    chat, monkeypatch
):
    kernel = type("Kernel", (), {"_allow_stdin": True})
    monkeypatch.setattr(
        "irann.chat.widget.get_ipython", lambda: type("Shell", (), {"kernel": kernel})
    )
    widget = chat("Ay,\nmadam.\n\n")
    view = "application/vnd.jupyter.widget-view+json"
    assert view in widget._repr_mimebundle_()
    assert widget._repr_mimebundle_()["text/plain"] == repr(widget)  # a console shows what to type
    assert "run this cell to talk" in widget._repr_mimebundle_()["text/html"]
    kernel._allow_stdin = False

    async def cell():
        widget.say("Who is there?")
        assert widget.session.turns[-1].text == "Ay,\nmadam." and not widget.busy

    asyncio.run(cell())
    bundle = widget._repr_mimebundle_()
    assert view not in bundle and "Ay,<br>madam." in bundle["text/html"]
    assert bundle["text/plain"] == "ROMEO:\nWho is there?\n\nJULIET:\nAy,\nmadam."
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5")
    assert view in widget._repr_mimebundle_()


def test_a_notebook_that_is_executed_without_a_reader_stores_the_transcript(here):
    cell = (
        "from irann import Chat\nchat = Chat('runs/gpt-tiny', length=20, "
        "seed=3)\nchat.say('Who is there?')\nchat"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(here)}}
    )
    client.execute(env=ENV)
    outputs = [out for out in notebook.cells[0].outputs if out.output_type == "execute_result"]
    session = Session(here / "runs" / "gpt-tiny", length=20, seed=3)
    talk(session, "Who is there?")
    assert [set(out.data) for out in outputs] == [{"text/plain", "text/html"}]
    assert outputs[0].data["text/plain"] == session.scene()
    assert "irann-reader" in outputs[0].data["text/html"]


def test_a_bubble_names_a_run_and_not_where_it_lies():
    from irann.chat.html import _bubble

    assert "<div class='irann-name'>ROMEO \u00b7 gpt</div>" in _bubble(
        "ROMEO", "", "/a/home/runs/gpt"
    )
    assert "<div class='irann-name'>runs/gpt</div>" in _bubble("", "", "runs/gpt")


@torch.no_grad()
def test_what_is_likely_is_read_by_the_settings_too(here):
    session = Session("thinker", stop="fixed", rounds=2)
    excite(session.model, 0.2)
    session.say("Hello there, gentle cousin")
    text = session.model.vocabulary.encode(session.inspect().text)[None]
    for rounds in (5, 1):
        session.set("rounds", rounds)
        p = session.model.read(text, stop="fixed", rounds=rounds)[0][0].softmax(-1)
        told = [row[0][1] for row in session.inspect().likely]
        assert told == pytest.approx(p.amax(-1).tolist(), abs=1e-5)


def test_a_scene_that_has_begun_stays_one_whatever_model_comes():
    one = model_of(shakespeare.CHARACTERS)
    session = Session(one)
    session.say("Who is there?")
    other = model_of("\nabc")
    session.use(other)
    assert session.mode == "play"


def test_a_reply_is_spelt_by_the_model_that_writes_it(corpus):
    session = Session(Parrot(corpus.vocabulary, "Ay, madam."), mode="plain")
    session.say("Hello")
    reply = session.reply()
    session.use(Parrot(Vocabulary("AHello"), "A"))
    assert [frame.text for frame in reply][-1] == "Ay, madam."


def test_what_is_likely_in_a_small_alphabet_is_all_of_it():
    model = model_of("abc")
    session = Session(model.eval(), mode="plain")
    session.say("abc")
    for row in session.inspect().likely:
        assert sorted(character for character, _ in row) == ["a", "b", "c"]
        assert sum(p for _, p in row) == pytest.approx(1)
    session.set("mode", "play")  # of ROMEO it knows no letter
    assert session.inspect().text == "abc"


def test_a_loss_that_is_no_number_is_not_described(corpus):
    session = parrot(corpus, "")
    for loss in (float("nan"), None, "low"):
        session.model.card = {"validation": loss}
        assert session.describe() == "Parrot: 1 parameters"
    session.model.card = {"validation": 1.5}
    assert session.describe().endswith(
        "1 parameters, 1.500 nats per character of the validation part"
    )


def test_a_chat_computes_where_it_is_told_to(here):
    for session in (Session("gpt", device="meta"), Chat("gpt", device="meta").session):
        assert session.model.device.type == "meta"


def test_a_model_that_ships_is_available_without_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "shipped", lambda: ["mamba", "mamba-again"])
    assert available() == ["mamba", "mamba-again"]


def test_a_window_of_one_character_is_not_inspected():
    model = model_of("abc", window=1)
    session = Session(model.eval(), mode="plain")
    session.say("abc")
    with pytest.raises(InputError, match="a window of one character"):
        session.inspect()


def test_a_setting_that_is_refused_uses_up_no_draw():
    model = model_of("".join(map(chr, range(60, 125))), "diffusion")
    session = Session(model.eval(), mode="plain", seed=3, length=4)
    session.say("abc")
    session.values["steps"] = 10**9
    with pytest.raises(InputError):
        session.reply()
    assert session.asked == 0
