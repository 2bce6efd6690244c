"""The conversation in a notebook cell: `from irann import Chat; Chat()`.

Ink is settled, grey may still change. Where the cell's event loop runs, a reply is a task that lets the loop breathe
between two drafts, so Stop works while the model writes. Where none runs, and with `say(text, wait=True)`, the reply is
written before Python goes on; a page without widgets shows the transcript. Whatever a reader or a model wrote is escaped
before it becomes HTML.
"""

import asyncio
import os
import time
from html import escape

import ipywidgets as w
from IPython import get_ipython

from .. import zoo
from ..checkpoint import CheckpointError
from ..figures import ACCENT, INK, PALE
from ..lm import SAMPLING, LanguageModel
from ..settings import Setting
from .session import MODES, Frame, Look, Session, Turn, available

EVERY = (
    0.08  # seconds between two redraws at least: drawing takes the browser more time than Python
)
SHOWN = 20_000  # characters of a long scene on the screen
STYLE = f"""<style>
.irann-chat .irann-scene, .irann-chat .irann-look {{font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; padding: 8px;
  color: var(--jp-content-font-color1, inherit)}}
.irann-chat .irann-scene {{max-height: 420px; overflow-y: auto; display: flex; flex-direction: column-reverse}}
.irann-chat .irann-turn {{border-radius: 10px; padding: 6px 10px; margin: 4px 0; max-width: 85%; width: fit-content;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: text}}
.irann-chat .irann-reader {{background: rgba(0, 114, 178, .16); margin-left: auto}}
.irann-chat .irann-model {{background: rgba(128, 128, 128, .13)}}
.irann-chat .irann-name, .irann-chat .irann-small {{opacity: .7; font-size: 11px; line-height: 1.5; display: block}}
.irann-chat .irann-open {{color: {PALE}}}
.irann-chat .irann-error {{color: var(--jp-error-color1, #c22); white-space: pre-wrap}}
.irann-chat .irann-look {{line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere}}
.irann-chat .irann-look span {{border-radius: 2px}}
.irann-chat progress {{width: 120px; height: 8px; accent-color: {ACCENT}; vertical-align: middle; margin-right: 6px}}
.irann-chat .widget-html-content {{line-height: 1.5}}
</style>"""
# The text is in the page already; where a page may not write to the clipboard, the words say where to find it.
COPY = """<button class="jupyter-widgets jupyter-button widget-button irann-copy" title="copy the scene" style="width: auto" onclick="
  const text = this.closest('.irann-chat').querySelector('.irann-text textarea').value;
  const say = words => { this.textContent = words; setTimeout(() => this.textContent = 'Copy', 2000) };
  (navigator.clipboard?.writeText(text) ?? Promise.reject()).then(() => say('Copied'), () => say('Below, as text'))">Copy</button>"""
MEANINGS = {
    "nll": "nats that each character cost",
    "rounds": "rounds of thought for what comes after each character",
    "expected_rounds": "rounds that the learned odds expect",
    "delta": "how much of its state the model rewrites at each character",
    "attention": "where the framed character looks, the mean of all layers and heads",
}
WRAP = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "0 4px"}
INSIDE = 1  # its place in the accordion


class Chat(w.VBox):
    """A transcript, a line to write on, the settings, and the model's inside on the text.

    `Chat()` takes the first model there are weights for; `Chat("gpt", temperature=0.8)`, or `Chat(model)` with a model of
    your own that has its vocabulary. `session` holds the conversation.
    """

    def __init__(self, model: LanguageModel | str | None = None, *, device="cpu", **settings):
        self.session: Session | None = None
        self.device, self.settings, self.task, self.stopping = device, settings, None, False
        self.frame: Frame | None = None
        self.began = self.drawn = 0.0
        self.heard: list[str] = []  # what loading had to say
        self._build()
        super().__init__(
            [
                w.HTML(STYLE),
                w.HBox([self.names, self.about], layout=WRAP),
                self.scene,
                self.message,
                self.line,
                w.HBox(
                    [self.send, self.stop, self.again, self.clear, w.HTML(COPY), self.pace],
                    layout=WRAP,
                ),
                self.more,
            ]
        )
        self.add_class("irann-chat")
        first = model if model is not None else next(iter(available()), next(iter(zoo.MODELS)))
        if not (isinstance(first, str) and first in zoo.MODELS):
            label = first if isinstance(first, str) else type(first).__name__
            self.names.options = [(label, first), *((name, name) for name in zoo.MODELS)]
        self.names.value, self.current = first, None
        self._use(first)
        self.names.observe(
            lambda change: change["new"] == self.current or self._use(change["new"]), "value"
        )
        self._draw()

    def _build(self):
        narrow = {"style": {"description_width": "auto"}, "layout": w.Layout(width="auto")}
        self.names = w.Dropdown(options=list(zoo.MODELS), description="model", **narrow)
        self.about, self.scene, self.message, self.pace = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.line = w.Text(
            placeholder="Say something and press Enter",
            continuous_update=True,
            layout=w.Layout(width="98%"),
        )
        self.send, self.stop, self.again, self.clear = (
            w.Button(description=name, tooltip=tip, layout=w.Layout(width="auto", flex="0 0 auto"))
            for name, tip in (
                ("Send", "let the model answer; with an empty line it speaks again"),
                ("Stop", "end the reply; what has settled stays"),
                ("Regenerate", "write the last reply anew"),
                ("Clear", "begin a new scene"),
            )
        )
        for button in (self.send, self.stop, self.again, self.clear):
            button.add_class(f"irann-{button.description.lower()}")
        self.line.add_class("irann-line")
        self.send.button_style = "primary"
        self.send.on_click(lambda _: self.say())
        self.line.on_msg(self._entered)
        self.stop.on_click(lambda _: self.halt())
        self.again.on_click(lambda _: self.regenerate())
        self.clear.on_click(lambda _: self.begin())
        self.knobs = w.VBox()
        self.copy = w.Textarea(layout=w.Layout(width="98%", height="180px"))
        self.copy.add_class("irann-text")
        self.kind = w.Dropdown(description="show", **narrow)
        self.place = w.IntSlider(description="character", min=0, max=0, continuous_update=True)
        self.view, self.looked = w.HTML(), None
        self.film = w.Play(min=0, max=0, interval=100, show_repeat=False)
        self.slide = w.IntSlider(
            description="draft", min=0, max=0, layout=w.Layout(flex="1 1 200px")
        )
        w.jslink((self.film, "value"), (self.slide, "value"))
        self.drafts = w.HTML()
        self.kind.observe(lambda _: self._draw_look(), "value")
        self.place.observe(lambda _: self._draw_look(), "value")
        self.slide.observe(lambda _: self._draw_draft(), "value")
        inside = w.VBox([w.HBox([self.kind, self.place], layout=WRAP), self.view])
        drafts = w.VBox([w.HBox([self.film, self.slide], layout=WRAP), self.drafts])
        self.more = w.Accordion([self.knobs, inside, drafts, self.copy], selected_index=None)
        for i, title in enumerate(
            ("Settings", "Inside the model", "Drafts of the last reply", "The scene as text")
        ):
            self.more.set_title(i, title)
        self.more.observe(lambda change: change["new"] == INSIDE and self.look(), "selected_index")

    @property
    def busy(self) -> bool:
        return self.task is not None and not self.task.done()

    def say(self, text: str | None = None, wait: bool = False) -> None:
        """Send a text, or what stands on the line, and let the model answer; with `wait` before the cell goes on.

        While a reply is written nothing is heard: a text is refused in a sentence, and the line keeps what stands on it.
        """
        if self.busy and text is not None:
            self._tell(
                "not heard, for a reply is being written: say it again when it has ended, or press Stop first"
            )
        if self.busy or self.session is None:
            return
        text, self.line.value = self.line.value if text is None else text, ""
        self._tell(self.session.say(text))
        self._answer(self.session.reply, wait)

    def regenerate(self) -> None:
        """Write the last reply anew."""
        if not self.busy and self.session is not None:
            self._tell("")
            self._answer(self.session.again)

    def begin(self) -> None:
        """Begin a new scene."""
        if not self.busy and self.session is not None:
            self.session.clear()
            self._tell("")
            self._draw()

    def halt(self) -> None:
        """End the reply after the model's next step."""
        self.stopping = True

    def look(self) -> None:
        """Show the model's inside on the last window of the scene; an open panel is kept up to date."""
        if not self.busy and self.session is not None:
            self._look()

    def _look(self) -> None:
        try:
            self.looked = self.session.look()
        except Exception as error:
            self.looked, self.view.value = (
                None,
                f"<span class='irann-small'>{escape(str(error) or type(error).__name__)}</span>",
            )
            return
        self.place.max = len(self.looked.text) - 1
        self.place.value = self.place.max
        kinds, before = [*self.looked.values, *self.looked.maps], self.kind.value
        if list(self.kind.options) != kinds:
            self.kind.options = kinds
        self.kind.value = before if before in kinds else kinds[0]
        self._draw_look()

    def _answer(self, reply, wait: bool = False) -> None:
        self.stopping = False
        self.scene.layout.min_height = "440px"  # a growing text would move Stop from under the pointer, and the click would be lost
        loop = None if wait or _static() else _loop()
        frames = lambda: self._frames(reply)
        if loop is None:
            for _ in self._write(frames):
                pass
        else:
            self.task = loop.create_task(self._breathing(frames))

    def _frames(self, reply):
        """The frames of a reply; what was forgotten is said below a note that stands there already."""
        try:
            yield from reply()
        finally:
            if self.message.value and (forgot := self.session.forgot()):
                self.message.value += f"<span class='irann-small'>{escape(forgot)}</span>"

    async def _breathing(self, reply) -> None:
        for _ in self._write(reply):
            await asyncio.sleep(0)  # here the loop hears Stop

    def _write(self, reply):
        """Follow a reply, redraw now and then, and yield after each draft. Ends with the turn in the session."""
        self._enable(False)
        self.began, frames, last = time.monotonic(), None, None
        try:
            frames = reply()
            for self.frame in frames:
                last = self.frame
                if self.stopping:
                    break
                if time.monotonic() - self.drawn >= EVERY:
                    self._draw()
                yield
        except (
            Exception
        ) as error:  # the reader sees a sentence; a cell that is long done cannot show a traceback
            self._tell(str(error) or type(error).__name__, error=True)
        finally:
            if frames is not None:
                frames.close()
            self.frame, self.looked = None, None
            self._say_pace(last)
            if not self.message.value:
                self._tell(self.session.forgot())
            if self.more.selected_index == INSIDE:
                self._look()
            self._enable(True)
            self._draw()

    def _entered(self, widget, content, buffers) -> None:
        if content.get("event") != "submit" or self.busy:
            return
        loop = _loop()
        if loop is None:
            self.say()
        else:  # the last letters of a fast typist may arrive after Enter does
            self.waiting = loop.call_later(0.1, self.say)

    def _use(self, model) -> None:
        """Load a model and keep the scene; what goes wrong is said under the transcript. The first that loads gets the settings."""
        self.about.value = f"<span class='irann-small'><progress></progress>loading {escape(str(model))[:200]}</span>"
        self.halt()
        try:
            if self.session is None:
                session, dropped = Session(model, device=self.device, say=self.heard.append), []
                settings, self.settings = self.settings, {}  # refused ones are not tried again
                self.heard += filter(
                    None, [session.set(name, value) for name, value in settings.items()]
                )
                self.session = session
            else:
                dropped = self.session.use(model)
            self.current = model
            self.heard += (
                [f"{self.session.name} does not have {', '.join(dropped)}"] if dropped else []
            )
            self._tell("; ".join(self.heard))
        except OSError as error:
            self._tell(f"{model} cannot be read ({error.strerror or error})", error=True)
        except (ValueError, CheckpointError) as error:
            self._tell(str(error), error=True)
        self.names.value = (
            self.current
        )  # none, if there is none yet: then each can be chosen, the one that failed too
        self.about.value = f"<span class='irann-small'>{escape(self.session.describe()) if self.session else 'no model yet'}</span>"
        self.heard.clear()
        self.pace.value = ""
        self._enable(True)
        self._fill_knobs()
        if self.session is not None and self.more.selected_index == INSIDE:
            self._look()

    def _fill_knobs(self) -> None:
        session = self.session
        if session is None:
            self.knobs.children = ()
            return
        knobs = [
            _knob(name, setting, self._shown(name)) for name, setting in session.options.items()
        ]
        knobs.append(
            w.Text(
                value=self._shown("seed"),
                placeholder="none",
                description="seed",
                continuous_update=False,
            )
        )
        knobs.append(w.Dropdown(options=MODES, value=self._shown("mode"), description="mode"))
        knobs += [
            w.Text(value=self._shown(name), description=name, continuous_update=False)
            for name in ("reader", "speaker")
        ]
        for knob in knobs:
            knob.style = {"description_width": "90px"}
            knob.add_class(f"irann-knob-{knob.description}")
            knob.observe(self._turned, "value")
        self.knobs.children = tuple(knobs)

    def _shown(self, name: str):
        """-> what is set, as its knob shows it."""
        if name in ("seed", "mode", "reader", "speaker"):
            value = getattr(self.session, name)
            return "" if value is None else str(value)
        return self.session.get(name)

    def _turned(self, change) -> None:
        knob, value = change["owner"], change["new"]
        name = knob.description
        try:
            self._tell(self.session.set(name, (value.strip() or None) if name == "seed" else value))
        except ValueError as error:
            self._tell(str(error), error=True)
        knob.unobserve(self._turned, "value")
        knob.value = self._shown(name)
        knob.observe(self._turned, "value")

    def _enable(self, on: bool) -> None:
        for button in (self.send, self.again, self.clear):
            button.disabled = not on or self.session is None
        self.names.disabled = not on
        self.stop.disabled = on

    def _tell(self, message: str, error: bool = False) -> None:
        kind = "error" if error else "small"
        self.message.value = (
            f"<span class='irann-{kind}'>{escape(message)}</span>" if message else ""
        )

    def _draw(self) -> None:
        """Redraw the transcript; between two drafts only the growing reply is new."""
        self.drawn = time.monotonic()
        if self.session is None:
            return
        self.scene.value = scene_html(self.session, self.frame)
        if self.frame is not None:
            self._say_pace(self.frame)
        else:
            self.copy.value = self.session.scene()
            turn = self.session.turns[-1] if self.session.turns else None
            self.film.max = self.slide.max = max(0, len(turn.frames) - 1) if turn else 0
            self.slide.value = self.slide.max
            self._draw_draft()

    def _draw_draft(self) -> None:
        turn = self.session.turns[-1] if self.session and self.session.turns else None
        if turn is None or not turn.frames:
            self.drafts.value = "<span class='irann-small'>models that write a page at once leave their drafts here</span>"
            return
        frame = turn.frames[min(self.slide.value, len(turn.frames) - 1)]
        self.drafts.value = f"<div class='irann-look'>{draft_html(frame)}</div><span class='irann-small'>{escape(note_of(frame))}</span>"

    def _draw_look(self) -> None:
        if self.looked is not None and self.kind.value in {
            **self.looked.values,
            **self.looked.maps,
        }:
            self.place.layout.display = "" if self.kind.value in self.looked.maps else "none"
            self.view.value = look_html(self.looked, self.kind.value, self.place.value)

    def _say_pace(self, frame: Frame | None) -> None:
        """How far the reply is; once it is written, how long it took."""
        if frame is None:
            self.pace.value = ""
        elif self.frame is None:
            words = f"{frame.settled:,} characters in {time.monotonic() - self.began:.1f} s"
            self.pace.value = f"<span class='irann-small'>{words}</span>"
        else:
            words = ", ".join(filter(None, (f"{frame.settled:,} characters", note_of(frame))))
            bar = f"<progress value={frame.settled} max={self.session.get('length')}></progress>"
            self.pace.value = f"<span class='irann-small'>{bar}{escape(words)}</span>"

    def _repr_mimebundle_(self, **kwargs):
        """The live widget, and the transcript for where there are none: a page that nbconvert made, or GitHub."""
        plain = {
            "text/plain": (self.session and self.session.scene()) or "an empty stage",
            "text/html": self._repr_html_(),
        }
        return plain if _static() else (super()._repr_mimebundle_(**kwargs) or {}) | plain

    def _repr_html_(self) -> str:
        """The transcript as it stands, for pages without widgets; they may drop the style, so line breaks are elements."""
        return STYLE + f"<div class='irann-chat'>{self.scene.value}</div>".replace("\n", "<br>")


def _loop():
    """-> the event loop that runs here, or None, as in plain Python."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _static() -> bool:
    """-> whether this cell's output will be stored and nobody will click: nbconvert and nbval run cells that cannot ask for input.

    Voila runs them in the same way, but for a reader.
    """
    try:
        kernel = get_ipython().kernel
    except AttributeError:  # plain Python, or IPython without a kernel
        return False
    return not getattr(kernel, "_allow_stdin", True) and "voila" not in os.environ.get(
        "SERVER_SOFTWARE", ""
    )


def note_of(frame: Frame) -> str:
    """-> what the model said beside a draft, in words: its numbers, one per name."""
    singles = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in frame.note.items()
    }
    return ", ".join(
        f"{name} {value:.3g}"
        for name, value in singles.items()
        if isinstance(value, (int, float)) and name != "forgotten"
    )


def draft_html(frame: Frame) -> str:
    """-> the settled part in ink and the rest in grey, escaped."""
    grey = frame.text[frame.settled :]
    return escape(frame.text[: frame.settled]) + (
        f"<span class='irann-open'>{escape(grey)}</span>" if grey else ""
    )


def turn_html(turn: Turn) -> str:
    """-> one speech bubble, escaped."""
    end = {"stopped": "stopped", "length": "cut at its length"}.get(turn.ended, "")
    small = f"<span class='irann-small'>{end}</span>" if end else ""
    return _bubble(turn.speaker, escape(turn.text), turn.model) + small


def scene_html(session: Session, frame: Frame | None = None) -> str:
    """-> the transcript, escaped; a `frame` is the reply that is being written. A very long scene shows its end."""
    parts, room = [], SHOWN
    if frame is not None:
        parts.append(_bubble(frame.speaker, draft_html(frame), True))
    for turn in reversed(session.turns):
        parts.append(
            turn_html(turn)
            if len(turn.text) <= room
            else _bubble(turn.speaker, "... " + escape(turn.text[-room:]), turn.model)
        )
        room -= len(turn.text)
        if room <= 0:
            break
    inner = "".join(reversed(parts)) or "<span class='irann-small'>The stage is empty.</span>"
    return f"<div class='irann-scene'><div>{inner}</div></div>"  # the outer box runs upwards, so it stays at its end


def _bubble(speaker: str, inner: str, model: bool) -> str:
    kind = "model" if model else "reader"
    return f"<div class='irann-turn irann-{kind}'><span class='irann-name'>{escape(speaker)}</span>{inner}</div>"


def look_html(look: Look, name: str, place: int = -1) -> str:
    """-> the text with a number per character as the colour behind it, escaped. For a map, the row of the character at `place`."""
    is_map = name in look.maps
    values = look.maps[name][place].tolist() if is_map else look.values[name]
    place %= len(values)
    others = (
        values[:place] if is_map and place else values
    )  # a character looks at itself most, which would outshine the rest
    low, high = min(others), max(others)
    parts = []
    for i, (character, value) in enumerate(zip(look.text, values, strict=True)):
        share = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0
        style = f"background:rgba(230,159,0,{share:.2f})" + (f";color:{INK}" if share > 0.7 else "")
        style += ";outline:1px solid" if is_map and i == place else ""
        shown = "\u21b5\n" if character == "\n" else escape(character)
        parts.append(f"<span title='{value:.3f}' style='{style}'>{shown}</span>")
    bound = "at most, " if name == "nll" and not look.exact else ""
    legend = f"{name}: {bound}{MEANINGS.get(name, 'a number')}, from {low:.2f} (plain) to {high:.2f} (orange)"
    return f"<div class='irann-look'>{''.join(parts)}</div><span class='irann-small'>{escape(legend)}</span>"


def _knob(name: str, setting: Setting, value):
    """-> the widget for one setting: a list of choices, or a number that the session checks."""
    if setting.choices is not None:
        return w.Dropdown(
            options=setting.choices, value=value, description=name, tooltip=setting.help
        )
    if name in SAMPLING and isinstance(setting.default, float):
        high = max(2.0, value) if name == "temperature" else setting.high
        return w.FloatSlider(
            value=value,
            min=setting.low,
            max=high,
            step=0.05,
            description=name,
            tooltip=setting.help,
        )
    kind = w.IntText if isinstance(setting.default, int) else w.FloatText
    return kind(value=value, description=name, tooltip=setting.help)
