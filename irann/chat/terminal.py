"""The conversation in a terminal: `irann chat MODEL`, and in a pipe: `echo "Who is there?" | irann
chat gpt`.

Settled characters are written once and stay. What a model proposes for the rest of the line is
shown in grey and written over. Without a terminal there are neither colours nor proposals: the
replies go to standard output, everything else to standard error.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointError
from ..lm import SAMPLING, vocabulary_of
from ..settings import InputError
from .session import LENGTH, SCENE, WHY, Frame, Session
from .streams import advance, cells, check_encoding, check_stdin, heard, tell, visible

HELP = """Write a line and press Enter; the model answers. An empty line lets it speak
again. Ctrl-C stops a reply, Ctrl-D leaves. Without a value: what is set.
  /temp N                          temperature: 0 always takes the likeliest
  /topk N  /topp P                 top-k and top-p (nucleus) sampling
  /length N  /seed N               characters in a reply; the generator's seed
  /as NAME  /to NAME               who you are, and who answers
  /mode play|plain                 a scene, or going on with the text itself
  /model NAME                      another model, the same scene
  /again  /clear                   the last reply anew, a new scene
  /scene  /save FILE               show the scene, write it to a file
  /help  /quit"""
SHORT = {"temp": "temperature", "topk": "top_k", "topp": "top_p", "as": "reader", "to": "speaker"}
TAB = "    "  # in a terminal, where columns are counted
RESERVED = 3  # columns at a line's end: the terminal may write ^C there


def main(model: str, settings: dict[str, str], *, device: Any = "cpu") -> None:
    """Talk until the end or /quit. Raises InputError, CheckpointError if it cannot load or set."""
    settings = {SHORT.get(name, name): value for name, value in settings.items()}
    known = {"length": LENGTH} | SAMPLING | SCENE
    for name in known.keys() & settings.keys():  # refused before anything is loaded
        known[name].read(name, settings[name])
    check_stdin()
    session = Session(model, device=device, say=tell, mode=settings.get("mode"))
    for note in session.set_all(settings):
        tell(note)
    check_encoding(vocabulary_of(session.model).characters)
    Terminal(session).run()


class Terminal:
    """A session, and where its words go."""

    def __init__(self, session: Session):
        self.session = session
        self.typed = sys.stdin is not None and sys.stdin.isatty()
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.colours = self.live and "NO_COLOR" not in os.environ
        self.forgetting = False  # whether the reader knows that the model forgets

    def run(self) -> None:
        if self.typed:
            try:
                import readline  # noqa: F401  input() then edits lines and remembers them
            except ImportError:
                pass  # Windows
            print(self.paint(self.session.describe(), "2"))
            print(self.paint(WHY[self.session.mode], "2"))
            print(self.paint("/help lists what can be set, /quit leaves", "2"))
        while True:
            try:
                line = self.ask()
                if line is None or not self.obey(line):
                    return
            except KeyboardInterrupt:  # at the prompt, while a model loads, as a reply ends
                if not self.typed:
                    raise
                print("\n/quit or Ctrl-D leaves")

    def obey(self, line: str) -> bool:
        """Do what a line asks, or answer it -> whether to go on."""
        if line.startswith("/"):
            return self.command(line[1:])
        tell(self.session.say(line))
        self.answer(self.session.reply)
        return True

    def ask(self) -> str | None:
        """-> the next line, None when there are no more."""
        if not self.typed:
            line = heard(sys.stdin.readline)
            return line.rstrip("\r\n") if line else None
        try:
            return input(f"{self.session.reader}> " if self.session.mode == "play" else "> ")
        except EOFError:
            print()
            return None

    def answer(self, reply: Callable[[], Iterator[Frame]]) -> None:
        """Write a reply while it comes; Ctrl-C stops it."""
        pen = Pen(self.live, self.colours)
        heading = f"{self.session.speaker}:" if self.live and self.session.mode == "play" else ""
        with _interrupts(self.typed) as stopped:
            try:
                frames = reply()
                for frame in frames:
                    if heading:
                        print(self.paint(heading, "1"))
                        heading = ""
                    pen.write(frame)
                    if stopped:
                        break
                frames.close()  # pyright: ignore[reportAttributeAccessIssue]
            except (InputError, CheckpointError) as error:
                if not self.typed:
                    raise
                tell(str(error))
                return
        pen.end()
        if stopped and not self.typed:
            raise KeyboardInterrupt
        if stopped:
            print(self.paint("[stopped]", "2"))
        forgot = self.session.forgot()
        if forgot and not self.forgetting:  # said once in a scene: from then on it is always so
            tell(forgot)
            self.forgetting = True

    def command(self, line: str) -> bool:
        """Obey a slash command -> whether to go on. What cannot be done is said in a sentence."""
        word, _, value = line.strip().partition(" ")
        word = word.lower()
        value = value.strip()
        if word in ("quit", "exit", "q"):
            return False
        try:
            match word:
                case "help":
                    self.help()
                case "again":
                    self.answer(self.session.again)
                case "clear":
                    self.session.clear()
                    self.forgetting = False
                case "scene":
                    print(visible(self.session.scene()))
                case "save":
                    self.save(value)
                case "model":
                    self.model(value)
                case _:
                    self.set(SHORT.get(word, word), value)
        except (InputError, CheckpointError) as error:
            tell(str(error))
        return True

    def help(self) -> None:
        own = self.session.model.settings.items()
        tell(
            "\n".join([HELP, *(f"  /{name} N: {setting.help}" for name, setting in own)]), bare=True
        )

    def set(self, name: str, value: str) -> None:
        """Change a setting, or say what it is now."""
        session = self.session
        setting = session.option(name)
        if value:
            tell(session.set(name, value))
        choices = f"; {setting.words()}" if setting.choices else ""
        tell(f"{name}: {session.get(name)} ({setting.help}{choices})")

    def model(self, name: str) -> None:
        """Change the model, or say which it is."""
        note = self.session.use(name) if name else ""
        self.forgetting = False
        tell(self.session.describe())
        tell(note)

    def save(self, name: str) -> None:
        """Write the scene to a new file. Raises InputError if it cannot."""
        if not name:
            raise InputError("/save takes the name of a file")
        path = None
        try:
            path = Path(name).expanduser()
            scene = f"{self.session.scene()}\n".encode()
            with open(path, "xb") as file:
                file.write(scene)
        except FileExistsError:
            raise InputError(f"{name} is there already; choose another name") from None
        except (OSError, RuntimeError, ValueError) as error:  # no such home; a name that is none
            full = isinstance(error, OSError) and error.filename is None
            if full and path is not None:  # half a scene would stand in the way of the next try
                path.unlink()
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{name} could not be written: {reason}") from None
        tell(f"saved {name}")

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours else text


class Pen:
    """Writes a reply's frames: settled text once; if `live`, also what is proposed for its line."""

    def __init__(self, live: bool, colours: bool):
        self.live = live
        self.colours = colours
        self.shown = 0  # characters of the reply that are written for good
        self.column = 0
        self.proposed = False  # whether grey text stands behind the cursor

    def write(self, frame: Frame) -> None:
        settled = frame.text[self.shown : frame.settled]
        self.shown = max(self.shown, frame.settled)
        if not self.live:
            sys.stdout.write(visible(settled))
        else:
            self.draw(visible(settled, TAB), frame.text[self.shown :])
        sys.stdout.flush()

    def draw(self, settled: str, proposed: str) -> None:
        """Write over the proposed text, erased first: after a full line that would eat a letter."""
        width = shutil.get_terminal_size().columns
        if self.proposed:
            sys.stdout.write("\x1b[K")
        self.column = advance(self.column, settled, width)
        sys.stdout.write(settled)
        tail = self.tail(proposed, width)
        if tail:
            back = sum(map(cells, tail))
            sys.stdout.write(f"\x1b[90m{tail}\x1b[0m\x1b[{back}D")
        self.proposed = bool(tail)

    def tail(self, proposed: str, width: int) -> str:
        """-> what is unsettled and fits on the cursor's line: only there can it be overwritten."""
        room = width - self.column - RESERVED
        if not self.colours or room <= 0:
            return ""
        line = visible(proposed[:width], TAB).split("\n")[0]
        while line and not cells(line[0]):  # it would join a settled character
            line = line[1:]
        fitting = 0
        for end, character in enumerate(line):
            fitting += cells(character)
            if fitting > room:
                return line[:end]
        return line

    def end(self) -> None:
        print("\x1b[K" if self.proposed else "", flush=True)


@contextmanager
def _interrupts(catch: bool) -> Iterator[list[int]]:
    """-> a list that Ctrl-C's signal goes to: step, then reply end; a second interrupts at once."""
    caught: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    except KeyboardInterrupt:
        if not catch:
            raise
        print()
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
