"""A scene, a draft and an inspection as HTML. What a reader or a model wrote is escaped here."""

from dataclasses import replace
from html import escape
from pathlib import Path

from ..figures import ACCENT, INK, PALE, visible
from .session import WHY, Frame, Inspection, Session, Turn

SHOWN = 20_000  # characters of a long scene on the screen
STYLE = f"""<style>
.irann-chat .irann-scene, .irann-chat .irann-text-view {{font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace;
  padding: 8px}}
.irann-chat .irann-scene {{max-height: 420px; overflow-y: auto; display: flex; flex-direction: column-reverse}}
.irann-chat .irann-turn {{border-radius: 10px; padding: 6px 10px; margin: 4px 0; max-width: 85%; width: fit-content;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: text}}
.irann-chat .irann-reader {{background: rgba(0, 114, 178, .16); margin-left: auto}}
.irann-chat .irann-model {{background: rgba(128, 128, 128, .13)}}
.irann-chat .irann-name, .irann-chat .irann-small {{opacity: .7; font-size: 11px; line-height: 1.5; display: block}}
.irann-chat .irann-open {{color: {PALE}}}
.irann-chat .irann-error {{color: var(--jp-error-color1, #c22); white-space: pre-wrap}}
.irann-chat .irann-text-view {{line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere}}
.irann-chat .irann-text-view span {{border-radius: 2px}}
.irann-chat .irann-pick span {{cursor: pointer}}
.irann-chat progress {{width: 120px; height: 8px; accent-color: {ACCENT}; vertical-align: middle; margin-right: 6px}}
.irann-chat .widget-html-content {{line-height: 1.5}}
:is(.jp-OutputArea, .cell_container):has(.irann-chat.jupyter-widgets) .irann-stored {{display: none}}
</style>"""
# The text is in the page; where it may not write to the clipboard, words say where to find it.
COPY = """<button class="jupyter-widgets jupyter-button widget-button irann-copy" title="copy the scene" style="width: auto" onclick="
  const text = this.closest('.irann-chat').querySelector('.irann-text textarea').value;
  const say = words => { this.textContent = words; setTimeout(() => this.textContent = 'Copy', 2000) };
  (navigator.clipboard?.writeText(text) ?? Promise.reject()).then(() => say('Copied'), () => say('Below, as text'))">Copy</button>"""
# A click on a character goes to Python through a field that is not seen.
PICK = (
    """ onclick="const i = [...this.children].indexOf(event.target);"""
    """ const field = this.closest('.irann-chat').querySelector('.irann-picked input');"""
    """ if (i >= 0 && field) { field.value = i; for (const kind of ['input', 'change'])"""
    """ field.dispatchEvent(new Event(kind, {bubbles: true})) }\""""
)
MEANINGS = {
    "nll": "negative log-likelihood: nats that each character cost",
    "rounds": "rounds of thinking about what comes after each character",
    "expected_rounds": "rounds expected by the learned halting probabilities",
    "delta": "mean step size: how much of its state the model rewrites at each character",
    "attention": "attention weights of the framed character",
}
NOTES = {  # what a model says beside a draft, in words
    "level": "noise level",
    "sure": "mean probability of its guesses",
    "rounds": "rounds of thinking",
    "masked": "characters still masked",
    "delta": "step size",
}
ENDINGS = {"stopped": "stopped", "length": "cut at its length"}


def small(text: str, error: bool = False) -> str:
    """-> a sentence below the scene, escaped; nothing for no text."""
    kind = "error" if error else "small"
    return f"<span class='irann-{kind}'>{escape(text)}</span>" if text else ""


def progress(words: str, value: int | None = None, most: int | None = None) -> str:
    """-> a bar, which runs on without a `value`, and words beside it, escaped."""
    state = "" if value is None else f" value={value} max={most}"
    return f"<span class='irann-small'><progress{state}></progress>{escape(words)}</span>"


def note_of(frame: Frame) -> str:
    """-> what the model said beside a draft, in words: its numbers, one per name."""
    words = []
    for name, value in frame.note.items():
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, int | float):
            number = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
            words.append(f"{NOTES.get(name, name)} {number}")
    return ", ".join(words)


def draft_html(frame: Frame) -> str:
    """-> the settled part in ink and the rest in grey, escaped."""
    settled = escape(frame.text[: frame.settled])
    proposed = escape(frame.text[frame.settled :])
    return settled + (f"<span class='irann-open'>{proposed}</span>" if proposed else "")


def draft_view(frame: Frame) -> str:
    """-> a draft with its note below it, escaped."""
    return f"<div class='irann-text-view'>{draft_html(frame)}</div>{small(note_of(frame))}"


def scene_html(session: Session, frame: Frame | None = None) -> str:
    """-> the escaped transcript, `frame` the reply in progress; of a very long scene, the end."""
    parts = []
    room = SHOWN
    if frame is not None:
        cut = max(0, len(frame.text) - room)
        end = replace(frame, text=frame.text[cut:], settled=max(0, frame.settled - cut))
        before = "... " if cut else ""
        parts.append(_bubble(frame.speaker, before + draft_html(end), frame.model))
        room -= len(frame.text)
    for turn in reversed(session.turns):
        if room <= 0:
            break
        parts.append(_turn_html(turn, room))
        room -= len(turn.text)
    inner = "".join(reversed(parts)) or small(f"The stage is empty. {WHY[session.mode]}")
    # the outer box runs upwards, so that it stays at its end
    return f"<div class='irann-scene'><div>{inner}</div></div>"


def transcript_html(scene: str) -> str:
    """-> a scene for pages without widgets; they may drop styles: line breaks are elements."""
    return STYLE + f"<div class='irann-chat'>{scene}</div>".replace("\n", "<br>")


def stored_html(text: str) -> str:
    """-> a scene as text, escaped, that is not seen where the widget is."""
    return f"<pre class='irann-stored'>{escape(text or 'an empty stage')}</pre>"


def _turn_html(turn: Turn, room: int) -> str:
    before = "... " if len(turn.text) > room else ""
    bubble = _bubble(turn.speaker, before + escape(turn.text[-room:]), turn.model)
    return bubble + small(ENDINGS.get(turn.ended, ""))


def _bubble(speaker: str, inner: str, model: str) -> str:
    kind = "model" if model else "reader"
    if Path(model).is_absolute():
        model = Path(model).name  # where a run lies on this machine is nobody else's affair
    who = " \u00b7 ".join(filter(None, [speaker, model])) or "you"
    name = f"<div class='irann-name'>{escape(who)}</div>"
    return f"<div class='irann-turn irann-{kind}'>{name}{inner}</div>"


def inspection_html(
    inspection: Inspection,
    name: str,
    position: int = -1,
    layer: int | None = None,
    head: int | None = None,
) -> str:
    """-> the text with a number per character as the colour behind it, escaped, and what may follow
    the character at `position`.

    For a map, the numbers are the row of that character. It attends to itself most: that would
    outshine the rest, so the colours are measured by the characters before it.
    """
    is_map = name in inspection.heads
    if is_map:
        values = inspection.map(name, layer, head)[position].tolist()
    else:
        values = inspection.values[name]
    position %= len(values)
    measured = values[:position] if is_map and position else values
    low = min(measured)
    high = max(measured)
    parts = []
    for i, (character, value) in enumerate(zip(inspection.text, values, strict=True)):
        strength = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0
        style = f"background:rgba(230,159,0,{strength:.2f})"
        if strength > 0.7:
            style += f";color:{INK}"
        if i == position and (is_map or inspection.likely):
            style += ";outline:1px solid"
        shown = "\u21b5\n" if character == "\n" else escape(character)
        parts.append(f"<span title='{value:.3f}' style='{style}'>{shown}</span>")
    bound = "at most, " if name == "nll" and not inspection.exact else ""
    meaning = MEANINGS.get(name, "a number")
    legend = f"{name}: {bound}{meaning}, from {low:.2f} (plain) to {high:.2f} (orange)"
    if is_map:
        layers = "all layers" if layer is None else f"layer {layer + 1}"
        heads = "all heads" if head is None else f"head {head + 1}"
        legend += f"; {layers}, {heads}"
    view = f"<div class='irann-text-view irann-pick'{PICK}>{''.join(parts)}</div>{small(legend)}"
    return view + _likely_html(inspection, position)


def _likely_html(inspection: Inspection, position: int) -> str:
    """-> the likeliest characters after the one at `position` with their probabilities, escaped."""
    if not inspection.likely:
        return ""
    shown = [f"{visible(c)[0]} {p:.0%}" for c, p in inspection.likely[position]]
    after = visible(inspection.text)[position]
    return small(f"next character after the framed {after} (click another): {', '.join(shown)}")
