"""The conversation in a notebook cell: `from irann import Chat; Chat()`.

Ink is settled, grey may still change. Where the cell's event loop runs, a reply is a task that lets
the loop breathe between two drafts, so Stop works while the model writes. Where none runs, and with
`say(text, wait=True)`, the reply is written before Python goes on; a page without widgets shows the
transcript.
"""

import asyncio
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as w
from IPython.core.getipython import get_ipython
from IPython.display import DisplayHandle

from .. import zoo
from ..checkpoint import CheckpointError
from ..lm import SAMPLING, LanguageModel
from ..settings import InputError, Setting
from ..training.bars import updatable_output
from . import html, streams
from .session import NAMES, SCENE, Frame, Inspection, Session, available

EVERY = 0.08  # seconds between two redraws at least: the browser takes longer to draw than Python
WRAP = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "0 4px"}
PANELS = ("Settings", "Inside the model", "Drafts of the last reply", "The scene as text")
INSIDE = PANELS.index("Inside the model")
BUTTONS = {
    "Send": "let the model answer; with an empty line it speaks again",
    "Stop": "end the reply; what has settled stays",
    "Regenerate": "write the last reply anew",
    "Clear": "begin a new scene",
}
ALL = -1  # layers, heads
EMPTY = "run this cell to talk with the model"  # on a page that was saved before anything was said
NO_DRAFTS = "models that write a page at once leave their drafts here"
NOT_HEARD = (
    "not heard, for a reply is being written: say it again when it has ended, or press Stop first"
)
PLAIN = (
    "a chat for a notebook cell; here: chat.say(TEXT, wait=True), then print(chat.session.scene())"
)


class Chat(w.VBox):
    """A transcript, a line to write on, the settings, and the model's inside on the text.

    `Chat()` takes the first model there are weights for; `Chat("gpt", temperature=0.8)`, or
    `Chat(model)` with a model of your own that has its vocabulary. `session` holds the
    conversation; it is None until a model could be loaded, and the sentence that says why not
    stands under the transcript.
    """

    def __init__(
        self, model: LanguageModel | str | None = None, *, device: Any = "cpu", **settings: Any
    ):
        self.session: Session | None = None
        self.device = device
        self.settings = settings
        self.task: asyncio.Task | None = None
        self.stopping = False
        self.frame: Frame | None = None
        self.inspected: Inspection | None = None
        self.began = 0.0
        self.drawn = 0.0
        self.current: LanguageModel | str | None = None
        self.heard: list[str] = []  # what loading had to say
        self.said = ""  # the sentence under the transcript
        self.stored: DisplayHandle | None = None  # the transcript beside the widget
        self.first: Frame | None = None  # of the page that is being written
        self._build_controls()
        self._build_panels()
        buttons = [self.submit, self.stop, self.again, self.clear, w.HTML(html.COPY), self.timing]
        super().__init__(
            [
                w.HTML(html.STYLE),
                w.HBox([self.names, self.about], layout=WRAP),
                self.scene,
                self.message,
                self.line,
                w.HBox(buttons, layout=WRAP),
                self.more,
            ]
        )
        self.add_class("irann-chat")
        first = model if model is not None else next(iter(available()), next(iter(zoo.MODELS)))
        names = [*zoo.names(), *map(str, zoo.runs())]
        label = first if isinstance(first, str) else type(first).__name__
        known = [] if isinstance(first, str) and first in names else [(label, first)]
        self.names.options = [*known, *((name, name) for name in names)]
        self.names.value = first
        self._use(first)
        self.names.observe(self._chosen, "value")

    def _build_controls(self) -> None:
        self.names = _narrow(description="model")
        self.about = w.HTML()
        self.scene = w.HTML()
        self.message = w.HTML()
        self.timing = w.HTML()
        self.line = w.Text(
            placeholder="Write something and press Enter",
            continuous_update=True,
            layout=w.Layout(width="98%"),
        )
        self.line.add_class("irann-line")
        self.line.on_msg(self._entered)
        self.submit, self.stop, self.again, self.clear = map(_button, BUTTONS)
        self.submit.button_style = "primary"
        self.submit.on_click(lambda _: self.say())
        self.stop.on_click(lambda _: self.halt())
        self.again.on_click(lambda _: self.regenerate())
        self.clear.on_click(lambda _: self.begin())

    def _build_panels(self) -> None:
        self.knobs = w.VBox()
        self.copy = w.Textarea(layout=w.Layout(width="98%", height="180px"))
        self.copy.add_class("irann-text")
        self.kind = _narrow(description="show")
        self.position = w.IntSlider(
            description="character", min=0, max=0, layout=w.Layout(flex="1 1 300px")
        )
        all_of_them = [("all", ALL)]
        self.layer = _narrow(description="layer", options=all_of_them)
        self.head = _narrow(description="head", options=all_of_them)
        self.picked = w.Text(layout=w.Layout(display="none"))
        self.picked.add_class("irann-picked")
        self.kind.add_class("irann-kind")
        self.view = w.HTML()
        self.film = w.Play(min=0, max=0, interval=100, show_repeat=False)
        self.slide = w.IntSlider(
            description="draft", min=0, max=0, layout=w.Layout(flex="1 1 200px")
        )
        w.jslink((self.film, "value"), (self.slide, "value"))
        self.drafts = w.HTML()
        aims = [self.kind, self.layer, self.head, self.position]
        for aim in aims:
            aim.observe(lambda _: self._draw_inspection(), "value")
        self.picked.observe(self._picked, "value")
        self.slide.observe(lambda _: self._draw_draft(), "value")
        inside = w.VBox([w.HBox([*aims, self.picked], layout=WRAP), self.view])
        drafts = w.VBox([w.HBox([self.film, self.slide], layout=WRAP), self.drafts])
        self.more = w.Accordion([self.knobs, inside, drafts, self.copy])
        for i, title in enumerate(PANELS):  # as ipywidgets 7 knows it too, which Colab has
            self.more.set_title(i, title)
        self.more.observe(self._opened, "selected_index")

    # ------------------------------------------------------------------------- what the reader does

    @property
    def busy(self) -> bool:
        return self.task is not None and not self.task.done()

    def say(self, text: str | None = None, wait: bool = False) -> None:
        """Send a text, or what stands on the line, for an answer; with `wait`, the cell waits.

        While a reply is written nothing is heard: a text is refused in a sentence, and the line
        keeps what stands on it.
        """
        if self.busy and text is not None:
            self._tell(NOT_HEARD)
        if self.busy or self.session is None:
            return
        if text is None:
            text = self.line.value
        self.line.value = ""
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
            self._refresh()

    def halt(self) -> None:
        """End the reply after the model's next step."""
        self.stopping = True

    def inspect(self) -> None:
        """Show the model's inside on the scene's last window; an open panel is kept up to date."""
        if not self.busy and self.session is not None:
            self._inspect()

    def _chosen(self, change: dict) -> None:
        if change["new"] != self.current:
            self._use(change["new"])

    def _opened(self, change: dict) -> None:
        if change["new"] == INSIDE:
            self.inspect()

    def _entered(self, widget: w.Widget, content: dict, buffers: list) -> None:
        if content.get("event") != "submit" or self.busy:
            return
        loop = _loop()
        if loop is None:
            self.say()
        else:  # the last letters of a fast typist may arrive after Enter does
            self.waiting = loop.call_later(0.1, self.say)

    def _picked(self, change: dict) -> None:
        """A character of the inspected text was clicked."""
        if change["new"].isdecimal() and self.inspected is not None:
            self.position.value = min(int(change["new"]), self.position.max)
        self.picked.value = ""

    def _turned(self, change: dict) -> None:
        knob = change["owner"]
        name = knob.description
        value = change["new"]
        if isinstance(value, str) and self._talking().option(name).default is None:
            value = value.strip() or None
        try:
            self._tell(self._talking().set(name, value))
        except InputError as error:
            self._tell(str(error), error=True)
        knob.unobserve(self._turned, "value")
        knob.value = self._shown(name)
        knob.observe(self._turned, "value")
        if name == "mode":
            self._draw()
        if not self.busy and name in self._talking().model.settings:
            self._refresh()

    # -------------------------------------------------------------------------------------- a reply

    def _talking(self) -> Session:
        assert self.session is not None
        return self.session

    def _answer(self, reply: Callable[[], Iterator[Frame]], wait: bool = False) -> None:
        self.stopping = False
        # a growing text would move Stop from under the pointer, and the click would be lost
        self.scene.layout.min_height = "440px"
        loop = None if wait or _static() else _loop()
        if loop is not None:
            self.task = loop.create_task(self._breathing(reply))
            return
        for _ in self._write(reply):
            pass

    async def _breathing(self, reply: Callable[[], Iterator[Frame]]) -> None:
        for _ in self._write(reply):
            await asyncio.sleep(0)  # here the loop hears Stop

    def _write(self, reply: Callable[[], Iterator[Frame]]) -> Iterator[None]:
        """Follow a reply, redraw now and then, and yield after each draft. Ends with the turn in
        the session.
        """
        self._enable(False)
        self.timing.value = html.progress("the model begins")
        self.began = time.monotonic()
        self.first = None
        last = None
        frames = None
        try:
            frames = reply()
            for last in frames:
                self.frame = last
                if self.stopping:
                    break
                if time.monotonic() - self.drawn >= EVERY:
                    self._draw()
                yield
        except Exception as error:
            self._fail(error)
        finally:
            if frames is not None:
                frames.close()  # pyright: ignore[reportAttributeAccessIssue]
            self._ended(last)

    def _ended(self, last: Frame | None) -> None:
        self.frame = None
        self.inspected = None
        self.timing.value = ""
        if last is not None:
            seconds = time.monotonic() - self.began
            self.timing.value = html.small(f"{last.settled:,} characters in {seconds:.1f} s")
        if forgot := self._talking().forgot():
            self.message.value += html.small(forgot)
        self._enable(True)
        self._draw()
        self._refresh()

    def _fail(self, error: Exception) -> None:
        """Say what went wrong; a fault of the program, not the input, also logs its traceback."""
        if isinstance(error, InputError | CheckpointError):
            self._tell(str(error), error=True)
        else:
            traceback.print_exception(error)
            self._tell(f"{type(error).__name__}: {error}", error=True)
        if getattr(get_ipython(), "kernel", None) is None:  # nobody sees the widget
            streams.tell(self.said)

    # ------------------------------------------------------------------------------------ the model

    def _use(self, model: LanguageModel | str) -> None:
        """Load a model, keep the scene. The first that loads gets the settings that were given."""
        self.about.value = html.progress(f"loading {str(model)[:200]}")
        self.halt()
        self._tell("")
        try:
            self._load(model)
            self.current = model
            self._tell("; ".join(self.heard))
        except Exception as error:
            self._fail(error)
        self.names.value = self.current  # with none, each can be chosen, also the one that failed
        described = self.session.describe() if self.session else "no model yet"
        self.about.value = html.small(described)
        self.heard.clear()
        self.timing.value = ""
        self._enable(True)
        self._fill_knobs()
        self._draw()
        self._refresh()

    def _load(self, model: LanguageModel | str) -> None:
        if self.session is None:
            settings = self.settings
            self.settings = {}  # refused ones are not tried again
            named = SCENE.keys() & settings.keys()
            scene = {name: SCENE[name].read(name, settings[name]) for name in named}
            self.settings = settings  # until a model could be loaded
            session = Session(model, device=self.device, say=self.heard.append, **scene)
            self.settings = {}
            self.heard += session.set_all(settings)
            self.session = session
        elif note := self.session.use(model):
            self.heard.append(note)

    def _fill_knobs(self) -> None:
        settings = self.session.options | SCENE | NAMES if self.session is not None else {}
        knobs = [_knob(name, setting, self._shown(name)) for name, setting in settings.items()]
        for knob in knobs:
            knob.style = {"description_width": "90px"}
            knob.add_class(f"irann-knob-{knob.description}")
            knob.observe(self._turned, "value")
        self.knobs.children = tuple(knobs)

    def _shown(self, name: str) -> Any:
        """-> what is set, as its knob shows it."""
        value = self._talking().get(name)
        if self._talking().option(name).default is None:  # its knob is a line of text
            return "" if value is None else str(value)
        return value

    # ----------------------------------------------------------------------------------- the screen

    def _enable(self, on: bool) -> None:
        for button in (self.submit, self.again, self.clear):
            button.disabled = not on or self.session is None
        self.names.disabled = not on
        self.stop.disabled = on

    def _tell(self, message: str, error: bool = False) -> None:
        self.said = message
        self.message.value = html.small(message, error)

    def _draw(self) -> None:
        """Redraw the transcript; between two drafts only the growing reply is new."""
        self.drawn = time.monotonic()
        if self.session is None:
            return
        self.scene.value = html.scene_html(self.session, self.frame)
        if self.frame is not None:
            notes = [f"{self.frame.settled:,} characters", html.note_of(self.frame)]
            words = ", ".join(filter(None, notes))
            length = self.session.get("length")
            self.timing.value = html.progress(words, self._done(self.frame), length)
            return
        if self.stored is not None:
            self.stored.update(self._stored(), raw=True)
        self.copy.value = self.session.scene()
        last_frame = max(0, len(self._last_drafts()) - 1)
        self.film.max = last_frame
        self.slide.max = last_frame
        self.slide.value = last_frame
        self._draw_draft()

    def _done(self, frame: Frame) -> int:
        """-> how many characters are as good as written: of a page that settles at its end, the
        part by which its noise, or what is masked, has become less.
        """
        first = self.first
        if first is None or len(first.text) != len(frame.text):
            self.first = first = frame
        for name in ("level", "masked"):
            most = first.note.get(name)
            if most:
                done = int((1 - frame.note.get(name, 0) / most) * (len(frame.text) - first.settled))
                return max(frame.settled, first.settled + done)
        return frame.settled

    def _last_drafts(self) -> tuple[Frame, ...]:
        return self.session.turns[-1].frames if self.session and self.session.turns else ()

    def _draw_draft(self) -> None:
        drafts = self._last_drafts()
        if drafts:
            drawn = drafts[min(self.slide.value, len(drafts) - 1)]
            self.drafts.value = html.draft_view(drawn)
        else:
            self.drafts.value = html.small(NO_DRAFTS)

    def _refresh(self) -> None:
        """An open panel shows what is so now."""
        if self.session is not None and self.more.selected_index == INSIDE:
            self._inspect()

    def _inspect(self) -> None:
        self.inspected = None
        try:
            self.inspected = self._talking().inspect()
        except InputError as error:
            self.view.value = html.small(str(error))
            return
        except Exception as error:
            self.view.value = ""
            self._fail(error)
            return
        self.position.max = len(self.inspected.text) - 1
        self.position.value = self.position.max
        for aim, axis in ((self.layer, 0), (self.head, 1)):
            sizes = {weights.shape[axis] for weights in self.inspected.heads.values()}
            options = [("all", ALL), *((str(i + 1), i) for i in range(max(sizes, default=0)))]
            if list(aim.options) != options:
                aim.options = options
        kinds = (*self.inspected.values, *self.inspected.heads)
        before = self.kind.value
        if self.kind.options != kinds:
            self.kind.options = kinds
        self.kind.value = before if before in kinds else kinds[0]
        self._draw_inspection()

    def _draw_inspection(self) -> None:
        shown = self.inspected
        if shown is None or self.kind.value not in shown.values | shown.heads:
            return
        aimed = self.kind.value in shown.heads
        for aim in (self.layer, self.head):
            aim.layout.display = "" if aimed else "none"
        self.position.layout.display = "" if aimed or shown.likely else "none"
        sizes = shown.heads[self.kind.value].shape if aimed else ()
        aims = zip((self.layer, self.head), sizes)  # another map may have had more of them
        chosen = [aim.value if aim.value in range(size) else None for aim, size in aims]
        self.view.value = html.inspection_html(shown, self.kind.value, self.position.value, *chosen)

    def __repr__(self) -> str:
        if self.session is None:
            return f"a chat without a model: {self.said}"
        return f"{self.session.describe()}; {PLAIN}"

    def _repr_mimebundle_(self, **options: Any) -> dict:
        """The live widget, and a transcript for where there is none: nbconvert's pages, GitHub."""
        scene = self.session.scene() if self.session else ""
        bundle = {"text/plain": scene or repr(self), "text/html": self._repr_html_()}
        if not _static():
            if not scene:
                bundle["text/html"] = html.small(EMPTY)
            bundle = (super()._repr_mimebundle_(**options) or {}) | bundle
            self.stored = updatable_output(self._stored())
        return bundle

    def _stored(self) -> dict:
        """The scene as an output of its own: a notebook opened again has it, but no widget."""
        return {"text/html": html.stored_html(self.session.scene() if self.session else "")}

    def _repr_html_(self) -> str:
        return html.transcript_html(self.scene.value or self.message.value)  # why there is none


def _loop() -> asyncio.AbstractEventLoop | None:
    """-> the event loop that runs here, or None, as in plain Python."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _static() -> bool:
    """-> whether this cell's output will be stored and nobody will click.

    nbconvert and nbval run cells that cannot ask for input. Voila does the same, but for a reader.
    """
    kernel = getattr(get_ipython(), "kernel", None)  # plain Python has none
    voila = "voila" in os.environ.get("SERVER_SOFTWARE", "")
    return kernel is not None and not getattr(kernel, "_allow_stdin", True) and not voila


def _narrow(**options: Any) -> w.Dropdown:
    style = {"description_width": "auto"}
    return w.Dropdown(style=style, layout=w.Layout(width="auto"), **options)


def _button(name: str) -> w.Button:
    layout = w.Layout(width="auto", flex="0 0 auto")
    button = w.Button(description=name, tooltip=BUTTONS[name], layout=layout)
    button.add_class(f"irann-{name.lower()}")
    return button


def _knob(name: str, setting: Setting, value: Any) -> Any:
    """-> the widget for one setting; the session checks what it says."""
    options = {"value": value, "description": name, "tooltip": setting.help}
    if setting.choices is not None:
        return w.Dropdown(options=setting.choices, **options)
    if setting.default is None or setting.type is str:
        return w.Text(placeholder="none", continuous_update=False, **options)
    if name in SAMPLING and setting.type is float:
        high = max(2.0, value) if name == "temperature" else setting.high
        return w.FloatSlider(min=setting.low, max=high, step=0.05, **options)
    if setting.type is bool:
        return w.Checkbox(**options)
    return w.IntText(**options) if setting.type is int else w.FloatText(**options)
