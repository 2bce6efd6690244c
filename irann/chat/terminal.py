"""The conversation in a terminal: `irann chat MODEL`, and in a pipe: `echo "Who is there?" | irann chat gpt`.

Settled characters are written once and stay. What a model proposes for the rest of the line is shown in grey and written
over. Without a terminal there are neither colours nor proposals: the replies go to standard output, everything else to
standard error.
"""

import os
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import CheckpointError
from ..lm import SAMPLING
from ..settings import InputError
from .session import LENGTH, MODES, SEED, Session

HELP = """Write a line and press Enter; the model answers. An empty line lets it speak
again. Ctrl-C stops a reply, Ctrl-D leaves. Without a value: what is set.
  /temp N  /topk N  /topp N        how bold, how many characters, how much
  /length N  /seed N               how long, and the dice
  /as NAME  /to NAME               who you are, and who answers
  /mode play|plain                 a scene, or going on with the text itself
  /model NAME                      another model, the same scene
  /again  /clear                   the last reply anew, a new scene
  /scene  /save FILE               show the scene, write it to a file
  /help  /quit"""
SHORT = {"temp": "temperature", "topk": "top_k", "topp": "top_p", "as": "reader", "to": "speaker"}


def main(model="gpt", device="cpu", **settings) -> None:
    """Talk until the input ends or says /quit. Raises ValueError and CheckpointError for what cannot be loaded or set."""
    settings = {SHORT.get(name, name): value for name, value in settings.items()}
    for name, known in (
        {"length": LENGTH} | SAMPLING
    ).items():  # what can be refused without loading is refused first
        if name in settings:
            known.check(name, settings[name])
    Terminal(Session(model, device=device, say=_tell, **settings)).run()


class Terminal:
    """A session, and where its words go."""

    def __init__(self, session: Session):
        self.session = session
        self.typed = sys.stdin.isatty()
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.colours = self.live and "NO_COLOR" not in os.environ

    def run(self) -> None:
        if self.typed:
            try:
                import readline  # noqa: F401  input() then edits the line and remembers the ones before
            except ImportError:
                pass  # Windows
            print(self.paint(self.session.describe(), "2"))
            print(self.paint("/help lists what can be set, /quit leaves", "2"))
        while True:
            try:
                line = self.ask()
                if line is None or not self.hear(line):
                    return
            except KeyboardInterrupt:  # at the prompt, while a model loads, as a reply ends
                if not self.typed:
                    raise
                print("\n/quit or Ctrl-D leaves")

    def hear(self, line: str) -> bool:
        """Do what a line asks, or answer it -> whether to go on."""
        if line.startswith("/"):
            return self.command(line[1:])
        if note := self.session.say(line):
            _tell(note)
        self.answer(self.session.reply)
        return True

    def ask(self) -> str | None:
        """-> the next line, None when there are no more."""
        if not self.typed:
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"what was said on standard input is not text ({error}): say it in UTF-8"
                ) from None
            return line.rstrip("\r\n") if line else None
        try:
            return input(f"{self.session.reader}> " if self.session.mode == "play" else "> ")
        except EOFError:
            print()
            return None

    def answer(self, reply) -> None:
        """Write a reply while it comes; Ctrl-C stops it."""
        if self.live and self.session.mode == "play":
            print(self.paint(f"{self.session.speaker}:", "1"))
        shown, column, grey = 0, 0, 0
        with _interrupts(self.typed) as stopped:
            try:
                frames = reply()
                for frame in frames:
                    fresh = _visible(frame.text[shown : frame.settled])
                    shown = max(shown, frame.settled)
                    if self.live:
                        column = (
                            len(fresh) - fresh.rfind("\n") - 1
                            if "\n" in fresh
                            else column + len(fresh)
                        )
                        tail = self.tail(frame.text[shown:], column)
                        if fresh or tail or grey:
                            sys.stdout.write(
                                ("\x1b[K" if grey else "") + fresh
                            )  # erased after a full line, it would take a letter
                            if tail:
                                sys.stdout.write(f"{self.paint(tail, '90')}\x1b[{len(tail)}D")
                            grey = len(tail)
                    else:
                        sys.stdout.write(fresh)
                    sys.stdout.flush()
                    if stopped:
                        break
                frames.close()
            except (ValueError, CheckpointError) as error:
                if not self.typed:
                    raise
                _tell(str(error))
                return
        print("\x1b[K" if grey else "", flush=True)
        if stopped and self.typed:
            print(self.paint("[stopped]", "2"))
        elif stopped:
            raise KeyboardInterrupt
        if forgot := self.session.forgot():
            _tell(forgot)

    def tail(self, proposed: str, column: int) -> str:
        """-> as much of the unsettled text as fits on the rest of the cursor's line; only there can it be written over."""
        width = shutil.get_terminal_size().columns
        if not self.colours or (column and column % width == 0):
            return ""
        return _visible(proposed).split("\n")[0][
            : max(0, width - column % width - 3)
        ]  # the terminal may write ^C there

    def command(self, line: str) -> bool:
        """Do what follows a slash -> whether to go on. What cannot be done is said in a sentence."""
        word, _, value = line.strip().partition(" ")
        word, value = word.lower(), value.strip()
        try:
            if word in ("quit", "exit", "q"):
                return False
            if word == "help":
                own = [
                    f"  /{name} N: {setting.help}"
                    for name, setting in self.session.model.settings.items()
                ]
                _tell("\n".join([HELP, *own]), bare=True)
            elif word == "again":
                self.answer(self.session.again)
            elif word == "clear":
                self.session.clear()
            elif word == "scene":
                print(_visible(self.session.scene()))
            elif word == "save":
                self.save(value)
            elif word == "model":
                self.model(value)
            else:
                self.set(SHORT.get(word, word), value)
        except (ValueError, CheckpointError) as error:
            _tell(str(error))
        except OSError as error:
            _tell(f"{value} cannot be read ({error.strerror or error})")
        return True

    def set(self, name: str, value: str) -> None:
        """Change a setting, or say what it is now."""
        session = self.session
        if name in ("reader", "speaker", "mode", "seed"):
            if value and (note := session.set(name, value)):
                _tell(note)
            meaning = {"mode": f"one of {', '.join(MODES)}", "seed": SEED.help}.get(
                name, "a character of the play"
            )
            _tell(f"{name}: {getattr(session, name)} ({meaning})")
        elif name not in session.options:
            raise InputError(f"there is no /{name} for {session.name}; /help lists what there is")
        else:
            if value:
                session.set(name, value)
            _tell(f"{name}: {session.get(name)} ({session.option(name).help})")

    def model(self, name: str) -> None:
        """Change the model, or say which it is."""
        dropped = self.session.use(name) if name else []
        _tell(self.session.describe())
        if dropped:
            _tell(f"{self.session.name} does not have {', '.join(dropped)}")

    def save(self, name: str) -> None:
        """Write the scene to a new file."""
        if not name:
            raise InputError("/save takes the name of a file")
        try:
            path = Path(name).expanduser()
            with open(path, "x", encoding="utf-8") as file:
                file.write(self.session.scene() + "\n")
        except FileExistsError:
            raise InputError(f"{name} is there already; choose another name") from None
        except (OSError, RuntimeError) as error:  # no such home, for one
            if (
                getattr(error, "filename", name) is None
            ):  # it was open: half a scene would stand in the way of the next try
                path.unlink()
            raise InputError(
                f"{name} could not be written: {getattr(error, 'strerror', None) or error}"
            ) from None
        _tell(f"saved {name}")

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours else text


@contextmanager
def _interrupts(catch: bool):
    """-> a list that holds the signal once Ctrl-C came: the step ends, then the reply. A second one interrupts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(signum, frame):
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


def _visible(text: str) -> str:
    """-> the text without control characters, which a terminal would obey; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _tell(message: str, bare: bool = False) -> None:
    sys.stdout.flush()
    print(message if bare else f"irann: {_visible(message)}", file=sys.stderr, flush=True)
