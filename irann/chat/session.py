"""A conversation with a model, without a screen: a scene of a play in which the reader and the model take turns.

The reader is one character, the model answers as another and stops when its speech ends. A second mode, `plain`, lets the
model go on with whatever was written. A session knows of a model only what `lm.LanguageModel` promises, so the model can
change in the middle of a scene.

    session = Session("gpt")
    session.say("Who is there?")
    for frame in session.reply():
        ...                                    # frame.text so far; its first frame.settled characters will not change

Leaving the loop early is the stop button: what has settled by then stays in the scene.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import zoo
from ..checkpoint import CheckpointError
from ..lm import SAMPLING, LanguageModel, evaluating, stream, vocabulary_of
from ..settings import InputError, Setting

LENGTH = Setting(300, "characters in a reply at most", low=1, high=100_000)
SEED = Setting(
    0, "the same seed gives the same conversation; none: a new one each time", low=0, high=2**62
)
MODES = ("play", "plain")
PLAINER = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\t": " ",
        "\r": "",
    }
)
KEPT = 400  # frames of a reply for the slider at most
END = "\n\n"  # an empty line ends a speech


@dataclass(frozen=True)
class Frame:
    """A reply while it is written: the first `settled` characters of `text` will not change again; `speaker` says it."""

    text: str
    settled: int
    note: dict = field(default_factory=dict)
    speaker: str = ""


@dataclass(frozen=True)
class Turn:
    """What one of the two said. `ended`, for a reply: speech, length or stopped; `frames`: how a page became sharp."""

    speaker: str
    text: str
    model: bool = False
    ended: str = ""
    forgotten: int = 0
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Look:
    """A model's inside on a text: `values` holds a number per character by name, `maps` a row of weights per character."""

    text: str
    values: dict[str, list[float]]
    maps: dict[str, Tensor]
    exact: bool = True  # or is the nll a bound?


class Session:
    """The turns so far, the settings, and the model that answers."""

    def __init__(
        self,
        model: LanguageModel | str | Path,
        /,
        *,
        device="cpu",
        say: Callable[[str], None] | None = None,
        **settings,
    ):
        self.turns: list[Turn] = []
        self.reader, self.speaker, self.mode = "ROMEO", "JULIET", "play"
        self.seed: int | None = None
        self.asked = 0  # replies since the seed was set: each draws differently, a whole conversation repeats
        self.device, self.told = device, say
        self.values: dict[str, object] = {}
        self.use(model)
        for name, value in settings.items():
            note = self.set(name, value)
            if note and say:
                say(note)

    def use(self, model: LanguageModel | str | Path) -> list[str]:
        """Change the model and keep the scene -> the settings that were dropped because the new model does not have them.

        Raises CheckpointError or ValueError as `zoo.load` does; the old model then stays.
        """
        new = (
            zoo.load(model, device=self.device, say=self.told)
            if isinstance(model, (str, Path))
            else model
        )
        vocabulary_of(new)
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        self.model, dropped = new, []
        for name, value in list(self.values.items()):
            try:
                self.option(name).check(name, value)
            except ValueError:
                del self.values[name]
                dropped.append(name)
        return dropped

    @property
    def options(self) -> dict[str, Setting]:
        """-> what can be set for this model, by name."""
        return {"length": LENGTH} | SAMPLING | self.model.settings

    def option(self, name: str) -> Setting:
        """-> one of the options. Raises ValueError that lists them."""
        if name not in self.options:
            raise InputError(
                f"{self.name} has no setting {name!r}; it has {', '.join([*self.options, 'seed'])}"
            )
        return self.options[name]

    def set(self, name: str, value) -> str:
        """Set an option, `seed`, `mode`, `reader` or `speaker` -> a note on characters the model does not know, or ''.

        Raises ValueError that names what was set and its range.
        """
        if name == "seed":
            self.seed = (
                None
                if value is None or str(value).lower() in ("none", "random")
                else SEED.check("seed", value)
            )
            self.asked = 0
        elif name == "mode":
            if value not in MODES:
                raise InputError(f"mode is one of {', '.join(MODES)}; got {value!r}")
            self.mode = value
        elif name in ("reader", "speaker"):
            setattr(self, name, _name(value))
            return self.clean(getattr(self, name))[1]
        else:
            self.values[name] = self.option(name).check(name, value)
        return ""

    def get(self, name: str):
        """-> the value of an option, its default where nothing was set."""
        return self.values.get(name, self.option(name).default)

    def describe(self) -> str:
        """-> the model, its size, and its validation loss where the checkpoint holds it."""
        text = f"{self.name}: {sum(p.numel() for p in self.model.parameters()):,} parameters"
        loss = (getattr(self.model, "card", None) or {}).get("validation")
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            text += f", {'' if self.model.exact else 'at most '}{loss:.3f} nats per character of the validation part"
        return text

    def clean(self, text: str) -> tuple[str, str]:
        """-> the text in characters that the model knows, and a sentence about those it does not know, or ''."""
        unknown = self.model.vocabulary.unknown(text)
        if not unknown:
            return text, ""
        swap = {}
        for character in unknown:
            plain = unicodedata.normalize("NFKD", character.translate(PLAINER))
            swap[ord(character)] = "".join(c for c in plain if not self.model.vocabulary.unknown(c))
        strange = "".join(c for c in unknown if c != "\r")
        shown = strange if len(strange) <= 20 else strange[:20] + "..."
        known = len(self.model.vocabulary)
        note = (
            f"{shown!r}: not among the {known} characters this model knows; replaced by plainer ones or left out"
            if shown
            else ""
        )
        return text.translate(swap), note

    def say(self, text: str) -> str:
        """Add the reader's turn; nothing if it is empty -> a note on characters the model does not know, or ''."""
        clean, note = self.clean(text)
        clean = clean.strip("\n") if self.mode == "play" else clean
        if clean:
            self.turns.append(Turn(self.reader, clean))
        return note

    def scene(self) -> str:
        """-> everything said so far, as the model sees it."""
        if self.mode == "plain":
            return "".join(turn.text for turn in self.turns)
        return END.join(f"{turn.speaker}:\n{turn.text.strip(chr(10))}" for turn in self.turns)

    def prompt(self) -> str:
        """-> the scene up to where the model takes over."""
        scene = self.scene()
        return scene if self.mode == "plain" else f"{scene}{END if scene else ''}{self.speaker}:\n"

    def reply(self) -> Iterator[Frame]:
        """Let the model answer -> frames; the turn is in `turns` when they end, or as far as it had settled when they are left.

        In a play the reply ends with the speech, at an empty line that has settled; else at `length` characters.
        Raises ValueError for settings that the model refuses; the scene is then as before.
        """
        prompt = self.clean(self.prompt())[0]
        settings = {name: value for name, value in self.values.items() if name != "length"}
        seed = None if self.seed is None else (self.seed + self.asked) % (SEED.high + 1)
        drafts = stream(self.model, prompt, self.get("length"), seed=seed, **settings)
        self.asked += 1
        return self._follow(
            drafts, len(prompt), self.mode, self.speaker
        )  # as they are now: both may be set while it writes

    def again(self) -> Iterator[Frame]:
        """Write the last reply anew. Raises ValueError if there is none; the old one stays if nothing new comes."""
        if not self.turns or not self.turns[-1].model:
            raise InputError("there is no reply yet that could be written anew")
        old, count = self.turns.pop(), len(self.turns)
        try:
            yield from self.reply()
        finally:
            if len(self.turns) == count:
                self.turns.append(old)

    def clear(self) -> None:
        """Begin a new scene with the same settings."""
        self.turns.clear()
        self.asked = 0

    def _follow(self, drafts, start: int, mode: str, speaker: str) -> Iterator[Frame]:
        decode, text, frames = self.model.vocabulary.decode, "", []
        place, ended, forgotten, failed = (
            max(1, start),
            "stopped",
            0,
            False,
        )  # an empty prompt is read as one newline
        try:
            for draft in drafts:
                if draft.settled > place:
                    text += decode(
                        draft.ids[0, place : draft.settled]
                    )  # settled text never changes: decoded once
                    place = draft.settled
                forgotten = min(start, max(forgotten, draft.forgotten))
                end = _speech_end(text) if mode == "play" else None
                if end is not None:
                    text = text[:end]
                    yield self._keep(frames, Frame(text, len(text), draft.note, speaker))
                    ended = "speech"
                    return
                yield self._keep(
                    frames,
                    Frame(text + decode(draft.ids[0, place:]), len(text), draft.note, speaker),
                )
            ended = "length"
        except Exception:
            failed = True
            raise
        finally:
            if not failed and text:
                kept = (
                    tuple(frames)
                    if any(len(frame.text) > frame.settled for frame in frames)
                    else ()
                )
                self.turns.append(Turn(speaker, text, True, ended, forgotten, kept))

    @staticmethod
    def _keep(frames: list[Frame], frame: Frame) -> Frame:
        """Remember a frame for the slider; a model that never proposes ahead has nothing to slide through."""
        if len(frame.text) > frame.settled or frames:
            frames.append(frame)
        if (
            len(frames) > KEPT
        ):  # every frame holds a whole draft: of a long reply every other one must do
            del frames[1:-1:2]
        return frame

    def forgot(self) -> str:
        """-> a sentence on what of the scene was out of the model's reach when its last reply ended, or ''."""
        lost = self.turns[-1].forgotten if self.turns else 0
        if not lost:
            return ""
        room = f"its window of {self.model.config.window} also has to hold what it writes"
        return f"by the end of its reply the model could not read the first {lost:,} characters of the scene: {room}"

    @torch.no_grad()
    def look(self) -> Look:
        """-> the model's inside on the last window of the scene: `nll` for every model, and what the model itself shows.

        The model's own settings count, as when it writes; but a bound is the same for every way of writing.
        """
        text = self.clean(self.scene())[0][-self.model.config.window :]
        if len(text) < 2:
            raise InputError("there is nothing to look at yet: say something first")
        ids = self.model.vocabulary.encode(text)[None].to(self.model.device)
        own = {name: value for name, value in self.values.items() if name in self.model.settings}
        dice = lambda: torch.Generator(self.model.device).manual_seed(0)
        with evaluating(self.model):
            nats = self.model.nll(ids, generator=dice(), **(own if self.model.exact else {}))[0]
            inside = self.model.inspect(ids, **(own | {"generator": dice()} if own else {}))
        values = {"nll": [0.0, *nats.float().tolist()]}  # nothing comes before the first character
        values |= {name: t.float().tolist() for name, t in inside.items() if t.ndim == 1}
        maps = {
            name: t.float().flatten(0, -3).mean(0).cpu()
            for name, t in inside.items()
            if t.ndim > 2 and t.shape[-1] == t.shape[-2]
        }
        return Look(text, values, maps, self.model.exact)


def _speech_end(text: str) -> int | None:
    """-> where the empty line after a speech begins, None while it goes on; empty lines before its first word do not count."""
    first = len(text) - len(text.lstrip())
    end = text.find(END, first)
    return None if end < 0 else end


def _name(value) -> str:
    """-> the name of a character, in capitals as in the plays."""
    name = " ".join(str(value).upper().replace(":", " ").split())
    if not name or len(name) > 40:
        raise InputError(f"a character's name has 1 to 40 letters; got {value!r}")
    return name


def available() -> list[str]:
    """-> the models that can be loaded: their weights came with the package, or there is a run of them."""
    return [name for name in zoo.MODELS if name in zoo.shipped() or _has_run(name)]


def _has_run(name: str) -> bool:
    try:
        return bool(zoo.newest_run(name))
    except CheckpointError:
        return False
