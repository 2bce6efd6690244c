"""A conversation without a screen: a scene of a play in which reader and model take turns.

The reader is one character, the model answers as another and stops when its speech ends. A second
mode, `plain`, lets the model go on with whatever was written. A session knows of a model only what
`lm.LanguageModel` promises, so the model can change in the middle of a scene.

    session = Session("gpt")
    session.say("Who is there?")
    for frame in session.reply():
        ...  # frame.text so far; its first frame.settled characters will not change

Leaving the loop early is the stop button: what has settled by then stays in the scene.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lm, shakespeare, zoo
from ..lm import SAMPLING, Draft, LanguageModel
from ..settings import InputError, Setting

LENGTH = Setting(300, "characters in a reply at most", low=1, high=100_000)
SEEDS = 2**62 + 1  # how many there are
SCENE = {
    "seed": replace(
        lm.SEED,
        default=None,
        kind=int,
        help="the same seed gives the same conversation; none: a new one each time",
    ),
    "mode": Setting("play", "a scene, or going on with the text itself", choices=("play", "plain")),
}
NAMES = {"reader": Setting("ROMEO", "who you are"), "speaker": Setting("JULIET", "who answers")}
PLAINER = str.maketrans("\u2018\u2019\u201c\u201d\u2013\t", "''\"\"- ") | {0x2014: "--"}
KEPT = 400  # frames of a reply for the slider at most
LIKELY = 8  # next characters that are shown
END = "\n\n"  # an empty line ends a speech
WHY = {
    "play": (
        "These models have read plays, and nothing else: they do not answer questions, they go on "
        "with the scene."
    ),
    "plain": "The model goes on with what you write, in the manner of the text it was trained on.",
}
EMPTY_LINE = re.compile(r"\r?\n\r?\n")


@dataclass(frozen=True)
class Frame:
    """A reply while it is written: the first `settled` characters of `text` will not change again,
    but for the white space at the end of a speech, which goes.

    `speaker` says it, and `model` names the model behind it.
    """

    text: str
    settled: int
    note: dict = field(default_factory=dict)
    speaker: str = ""
    model: str = ""


@dataclass(frozen=True)
class Turn:
    """What one of the two said; `model` names the model that wrote it, and is empty for the reader.
    In a text that goes on nobody plays a part, and `speaker` is empty.

    Of a reply, `ended` is speech, length or stopped; `frames` show how a page became sharp.
    """

    speaker: str
    text: str
    model: str = ""
    ended: str = ""
    forgotten: int = 0
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What a model shows about a text: a number for each character (the first is `nll`), and maps,
    which have a row of weights for each character, by layers and `heads`.

    `likely` has the likeliest next characters after each, with their probabilities. If the model is
    not `exact`, its nll is a bound.
    """

    text: str
    values: dict[str, list[float]]
    heads: dict[str, Float[Tensor, "l h t t"]] = field(default_factory=dict)
    exact: bool = True
    likely: list[list[tuple[str, float]]] = field(default_factory=list)

    @property
    def maps(self) -> dict[str, Float[Tensor, "t t"]]:
        """-> each map, the mean of its layers and heads."""
        return {name: self.map(name) for name in self.heads}

    def map(
        self, name: str, layer: int | None = None, head: int | None = None
    ) -> Float[Tensor, "t t"]:
        """-> the weights of one layer and head, or their mean over all where None is given. Raises
        IndexError for a layer or head that there is not.
        """
        weights = self.heads[name]
        weights = weights if layer is None else weights[[layer]]
        weights = weights if head is None else weights[:, [head]]
        return weights.mean((0, 1))


class Session:
    """The turns so far, the settings, and the model that answers.

    `say` hears what loading a model has to tell; `settings` are given to `set`. Raises as `use` and
    `set` do.
    """

    def __init__(
        self,
        model: LanguageModel | str | Path,
        /,
        *,
        device: str | torch.device = "cpu",
        say: Callable[[str], Any] | None = None,
        **settings: Any,
    ):
        self.turns: list[Turn] = []
        self.reader = "ROMEO"
        self.speaker = "JULIET"
        self.mode = "play"
        self.seed: int | None = None
        self.asked = 0  # replies since the seed was set: each draws anew, a conversation repeats
        self.device = device
        self.notify = say
        self.values: dict[str, Any] = {}
        self.mode_is_chosen = settings.get("mode") is not None
        notes = [self.use(model)]
        notes += self.set_all(settings)
        for note in notes:
            if say and note:
                say(note)

    def use(self, model: LanguageModel | str | Path) -> str:
        """Change the model, keep the scene -> a note on the mode, on settings now dropped, or ''.

        Of a model that has read plays one makes a scene; another goes on with a text, unless `mode`
        was set.
        Raises CheckpointError or InputError as `zoo.load` does; the old model then stays.
        """
        if isinstance(model, str | Path):
            name = str(model)
            try:
                new = zoo.load(model, device=self.device, say=self.notify)
            except OSError as error:
                reason = error.strerror or error
                raise InputError(f"{name} cannot be read ({reason})") from None
        else:
            new = model
            name = type(model).__name__
        lm.vocabulary_of(new)
        self.model = new
        self.name = name
        dropped = []
        for option, value in list(self.values.items()):
            try:
                self.option(option).check(option, value)
            except InputError:
                del self.values[option]
                dropped.append(option)
        notes = [f"{name} cannot take what was set for {', '.join(dropped)}"] if dropped else []
        if not self.mode_is_chosen and not self.turns:
            self.mode = self._own_mode()
            if self.mode == "plain":
                notes.append(
                    f"{name} was trained on another text than the plays: it goes on with what you "
                    "write (mode plain)"
                )
        return "; ".join(notes)

    def _own_mode(self) -> str:
        """-> the mode for this model where none was chosen."""
        characters = lm.vocabulary_of(self.model).characters
        return "play" if characters == shakespeare.CHARACTERS else "plain"

    # ------------------------------------------------------------------------------------- settings

    @property
    def options(self) -> dict[str, Setting]:
        """-> what can be set for this model, by name."""
        return {"length": LENGTH} | SAMPLING | self.model.settings

    def option(self, name: str) -> Setting:
        """-> one of the settings. Raises InputError that lists them."""
        known = self.options | SCENE | NAMES
        if name not in known:
            listed = ", ".join([*self.options, "seed"])
            raise InputError(f"{self.name} has no setting {name!r}; it has {listed}")
        return known[name]

    def set(self, name: str, value: Any) -> str:
        """Set an option, `seed`, `mode`, `reader` or `speaker` -> a note on unknown characters, or
        ''.

        A value may be text; None means an option's default. Raises InputError that names what was
        set and its range.
        """
        setting = self.option(name)
        if name in NAMES:
            setattr(self, name, _name(setting.default if value is None else value))
            return self.clean(self.get(name))[1]
        if name == "mode":
            self.mode = self._own_mode() if value is None else setting.read(name, value)
            self.mode_is_chosen = value is not None
        elif name == "seed":
            self.seed = setting.read(name, value)
            self.asked = 0
        elif value is None:
            self.values.pop(name, None)
        else:
            self.values[name] = setting.read(name, value)
        return ""

    def set_all(self, settings: dict[str, Any]) -> list[str]:
        """Set several -> the notes."""
        notes = [self.set(name, value) for name, value in settings.items()]
        return list(filter(None, notes))

    def get(self, name: str) -> Any:
        """-> what is set, the default where nothing was."""
        if name in NAMES or name in SCENE:
            return getattr(self, name)
        return self.values.get(name, self.option(name).default)

    def describe(self) -> str:
        """-> the model, its size, and its validation loss where the checkpoint holds it."""
        size = self.model.num_parameters
        loss = (self.model.card or {}).get("validation")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            return f"{self.name}: {size:,} parameters"
        bound = "" if self.model.exact else "at most "
        nats = f"{bound}{loss:.3f} nats per character of the validation part"
        return f"{self.name}: {size:,} parameters, {nats}"

    # ----------------------------------------------------------------------------- the conversation

    def clean(self, text: str) -> tuple[str, str]:
        """-> the text in characters that the model knows, and a sentence about those it does not
        know, or ''.

        A letter and an accent typed apart may be one character to the model, or the other way
        round.
        """
        vocabulary = lm.vocabulary_of(self.model)
        text = vocabulary.spelt(text)
        unknown = vocabulary.unknown(text)
        if not unknown:
            return text, ""
        plainer = {}
        for character in unknown:
            spelt = unicodedata.normalize("NFKD", character.translate(PLAINER))
            plainer[ord(character)] = "".join(c for c in spelt if not vocabulary.unknown(c))
        shown = unknown if len(unknown) <= 20 else unknown[:20] + "..."
        note = (
            f"{shown!r}: not among the {len(vocabulary)} characters this model knows; "
            "replaced by plainer ones or left out"
        )
        return text.translate(plainer), note

    def say(self, text: str) -> str:
        """Add the reader's turn, unless empty -> a note on characters the model lacks, or ''."""
        clean, note = self.clean(text)
        if self.mode == "play":
            clean = clean.strip("\n")
        if clean:
            self.turns.append(Turn(self.reader if self.mode == "play" else "", clean))
        return note

    def scene(self) -> str:
        """-> everything said so far, as the model sees it."""
        if self.mode == "plain":
            return "".join(turn.text for turn in self.turns)
        return END.join(f"{self._name_of(turn)}:\n" + turn.text.strip("\n") for turn in self.turns)

    def _name_of(self, turn: Turn) -> str:
        """-> who says it in a scene, also if it was said in a text that went on."""
        return turn.speaker or (self.speaker if turn.model else self.reader)

    def prompt(self) -> str:
        """-> the scene up to where the model takes over."""
        scene = self.scene()
        if self.mode == "plain":
            return scene
        return f"{scene}{END if scene else ''}{self.speaker}:\n"

    def reply(self) -> Iterator[Frame]:
        """Let the model answer -> frames; once they end or are left, what settled is in `turns`.

        In a play the reply ends with the speech, at an empty line that has settled; else at
        `length` characters. Mode and speaker may be set anew while it writes: they count from the
        next reply on. Raises InputError for settings that the model refuses; the scene is then as
        before.
        """
        prompt = self.clean(self.prompt())[0]
        settings = {name: value for name, value in self.values.items() if name != "length"}
        seed = None
        if self.seed is not None:
            seed = (self.seed + self.asked) % SEEDS
        drafts = lm.stream(self.model, prompt, self.get("length"), seed=seed, **settings)
        self.asked += 1
        speaker = self.speaker if self.mode == "play" else ""
        decode = lm.vocabulary_of(self.model).decode
        return self._follow(drafts, decode, len(prompt), self.mode, speaker, self.name)

    def again(self) -> Iterator[Frame]:
        """Rewrite the last reply, kept if nothing comes. Raises InputError if there is none."""
        if not self.turns or not self.turns[-1].model:
            raise InputError("there is no reply yet that could be written anew")
        old = self.turns.pop()
        count = len(self.turns)
        try:
            yield from self.reply()
        finally:
            if len(self.turns) == count:
                self.turns.append(old)

    def clear(self) -> None:
        """Begin a new scene with the same settings."""
        self.turns.clear()
        self.asked = 0

    def _follow(
        self,
        drafts: Iterator[Draft],
        decode: Callable[[Any], str],
        start: int,
        mode: str,
        speaker: str,
        model: str,
    ) -> Iterator[Frame]:
        text = ""  # what has settled: it never changes, and is decoded once
        read_to = max(1, start)  # an empty prompt is read as one newline
        frames: list[Frame] = []
        ended = "stopped"
        forgotten = 0
        try:
            for draft in drafts:
                if draft.settled > read_to:
                    text += decode(draft.ids[0, read_to : draft.settled])
                    read_to = draft.settled
                forgotten = min(start, max(forgotten, draft.forgotten))
                end = _speech_end(text) if mode == "play" else None
                if end is not None:
                    text = text[:end]
                    ended = "speech"
                proposed = "" if end is not None else decode(draft.ids[0, read_to:])
                frame = Frame(text + proposed, len(text), draft.note, speaker, model)
                _keep(frames, frame)
                yield frame
                if end is not None:
                    return
            ended = "length"
        except Exception:
            text = ""  # of a reply that fails nothing is kept
            raise
        finally:
            if text:
                self.turns.append(Turn(speaker, text, model, ended, forgotten, tuple(frames)))

    def forgot(self) -> str:
        """-> a sentence on what of the scene was out of reach when the last reply ended, or ''."""
        lost = self.turns[-1].forgotten if self.turns else 0
        if not lost:
            return ""
        return (
            f"by the end of its reply the model could not read the first {lost:,} characters of "
            f"the scene: its window of {self.model.config.window} also has to hold what it writes"
        )

    # -------------------------------------------------------------------------------- introspection

    @torch.no_grad()
    def inspect(self) -> Inspection:
        """-> what the model shows about the last window of the scene: `nll`, and what it has beside
        that.

        The model's own settings count, as when it writes; a bound does not depend on how the model
        writes. Raises InputError for a scene of less than two characters.
        """
        if self.model.config.window < 2:
            raise InputError("a window of one character leaves nothing to inspect")
        text = self.clean(self.scene())[0][-self.model.config.window :]
        if len(text) < 2:
            raise InputError("there is nothing to inspect yet: say something first")
        ids = lm.vocabulary_of(self.model).encode(text)[None].to(self.model.device)
        own = {name: value for name, value in self.values.items() if name in self.model.settings}
        with lm.evaluating(self.model, ids.numel()):
            nll_settings = own if self.model.exact else {}
            generator = lm.seeded(self.model, 0)
            nats = self.model.nll(ids, generator=generator, **nll_settings)[0].float().tolist()
            shown = self.model.inspect(ids, generator=lm.seeded(self.model, 0), **own)
            likely = self._likely(ids, own)
        values = {"nll": [0.0, *nats]}  # nothing comes before the first character
        heads = {}
        for name, tensor in shown.items():
            if tensor.ndim == 1:
                values[name] = tensor.float().tolist()
            elif tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2]:
                layered = tensor if tensor.ndim == 4 else tensor.flatten(0, -3).unsqueeze(0)
                heads[name] = layered.float().cpu()
        return Inspection(text, values, heads, self.model.exact, likely)

    def _likely(self, ids: Tensor, own: dict[str, Any]) -> list[list[tuple[str, float]]]:
        """-> likeliest characters after each, with probabilities; [] if the model is no Reader."""
        if not isinstance(self.model, lm.Reader):
            return []
        read = self.model.reading(own, lm.seeded(self.model, 0))
        p = read(ids)[0][0].float().softmax(-1)
        best = p.topk(min(LIKELY, p.shape[-1]))
        characters = lm.vocabulary_of(self.model).characters
        return [
            [(characters[i], value) for i, value in zip(row, values)]
            for row, values in zip(best.indices.tolist(), best.values.tolist())
        ]


def _keep(frames: list[Frame], frame: Frame) -> None:
    """Remember a frame for the slider, which a model that never proposes ahead does not need.

    Every frame holds a whole draft: of a long reply every other one must do.
    """
    if frames or len(frame.text) > frame.settled:
        frames.append(frame)
    if len(frames) > KEPT:
        del frames[1:-1:2]


def _speech_end(text: str) -> int | None:
    """-> where the empty line after a speech begins, or None; leading empty lines do not count."""
    first = len(text) - len(text.lstrip())
    end = EMPTY_LINE.search(text, first)
    return None if end is None else end.start()


def _name(value: Any) -> str:
    """-> the name of a character, in capitals as in the plays."""
    name = " ".join(str(value).upper().replace(":", " ").split())
    if not name or len(name) > 40:
        raise InputError(f"a character's name has 1 to 40 letters; got {value!r}")
    return name


def available() -> list[str]:
    """-> the names that can be loaded: with weights in the package, or with a run of their own."""
    return [name for name in zoo.names() if name in zoo.shipped() or zoo.newest_run(name)]
