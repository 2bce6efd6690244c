"""What every model of this book can do, said once: the protocol, the draft, and how left-to-right models write.

A model reads integer characters, `ids`, and answers with a likelihood or with text. Text comes as a stream of whole
drafts rather than of single characters, so that models that write left to right and models that polish a whole page at
once can stand behind the same screen.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .text import Vocabulary


@dataclass(frozen=True)
class Draft:
    """One frame of writing: the prompt and everything proposed so far.

    `ids` (b t); the first `settled` characters will not change again; `note` is a small dict to show beside the text.
    `generate` begins with the prompt. Left to right, every later frame is one character longer. Where a page is written at
    once, it holds the text up to the end of the page in hand, as that page stands. The last frame is the answer, all settled.
    """

    ids: Tensor
    settled: int
    note: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A knob of one model's generation, beyond temperature, top-k and top-p: its default, its range, its meaning."""

    default: int | float | str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None

    def check(self, name: str, value):
        """-> the value in the default's type. Raises ValueError that names the knob and its range."""
        if self.choices is not None:
            if value not in self.choices:
                raise ValueError(f"{name} is one of {', '.join(self.choices)}; got {value!r}")
            return value
        try:
            number = type(self.default)(value)
            exact = isinstance(number, int) and isinstance(value, (int, str))  # a float cannot hold all of the large ones
            fits = (exact or number == float(value)) and math.isfinite(number)
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits or (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
            kind = "a whole number" if isinstance(self.default, int) else "a number"
            top = "up" if self.high is None else f"to {self.high:,}" if isinstance(self.high, int) else f"to {self.high:g}"
            raise ValueError(f"{name} is {kind} from {self.low if self.low is not None else '-inf'} {top}; got {value!r}")
        return number


SAMPLING = {
    "temperature": Setting(1.0, "how bold: 0 always takes the likeliest character", low=0.0, high=100.0),
    "top_k": Setting(0, "only the k likeliest characters; 0: all", low=0),
    "top_p": Setting(1.0, "only the likeliest characters that together hold this probability", low=0.0, high=1.0),
}


LENGTH = Setting(0, "characters to write", low=0, high=10_000_000)
SEED = Setting(0, "the same seed gives the same text", low=0, high=2**62)


class LanguageModel(nn.Module):
    """The protocol that trainer, chat and benchmark speak. A new model subclasses this and passes test_contract.py.

    `config` is a frozen dataclass with at least `vocabulary` and `window`. `exact` says whether `surprise` is an exact
    likelihood or an upper bound of it. `settings` are the extra keyword arguments of `generate`, of `inside`, and, if `exact`,
    of `surprise`.
    """

    exact = True
    settings: ClassVar[dict[str, Setting]] = {}

    def __init__(self, config):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def loss(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(b window+1) -> a scalar to minimise, in nats per character, and its parts by their honest names."""
        raise NotImplementedError

    def surprise(self, ids: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(b t+1) -> (b t): nats for each character of `ids[:, 1:]`, exactly, or as a bound if not `exact`."""
        raise NotImplementedError

    def generate(self, prompt: Tensor, n: int, *, temperature=1.0, top_k=None, top_p=None, generator=None) -> Iterator[Draft]:
        """(b t) -> drafts; the last one holds the prompt and `n` more characters, all settled."""
        raise NotImplementedError

    def inside(self, ids: Tensor, *, generator: torch.Generator | None = None, **settings) -> dict[str, Tensor]:
        """(1 t) -> what this model has to show about each character of a text, by name: (t) numbers, or (... t s) maps."""
        return {}

    def check_ids(self, ids: Tensor) -> Tensor:
        """-> ids as int64, or a ValueError that says why they are not characters of this model."""
        if not isinstance(ids, Tensor):
            raise ValueError(f"ids are a tensor of whole numbers of shape (b, t); got a {type(ids).__name__}")
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"ids are whole numbers of shape (b, t); got {ids.dtype} of shape {tuple(ids.shape)}")
        if not torch.compiler.is_compiling() and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < self.config.vocabulary):
            raise ValueError(f"ids lie in 0..{self.config.vocabulary - 1}; got {int(ids.min())}..{int(ids.max())}")
        return ids.long()


class Reader(LanguageModel):
    """A model that reads from left to right. Subclasses write `read`; everything else follows from it."""

    @property
    def memory(self) -> int | None:
        """How many characters one state can hold; None means any number."""
        return self.config.window

    def read(self, ids: Tensor, state=None):
        """(b t), state -> (b t v), state: logits of the character after every new place. The state is the model's own affair.

        The inner loop of writing: ids are taken as they come. `loss`, `surprise`, `generate`, `inside` and a call of the model check them.
        """
        raise NotImplementedError

    def notes(self, state) -> dict:
        """What the last call of `read` has to show about its last place; goes on the draft."""
        return {}

    def forward(self, ids: Tensor) -> Tensor:
        """(b t) -> (b t v)"""
        return self.read(self.check_ids(ids))[0]

    def surprise(self, ids: Tensor, *, generator=None) -> Tensor:
        ids = self.check_ids(ids)
        return cross_entropy(self.read(ids[:, :-1])[0], ids[:, 1:])

    def loss(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.surprise(ids).mean()
        return loss, {"nats_per_char": loss.detach()}

    def generate(self, prompt: Tensor, n: int, *, temperature=1.0, top_k=None, top_p=None, generator=None) -> Iterator[Draft]:
        return left_to_right(self, prompt, n, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """(b t v), (b t) -> (b t): nats of each character, in float32 at least."""
    return F.cross_entropy(logits.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32)), ids, reduction="none")


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """(... v) -> (... v): logits to sample from, with -inf for characters that are out.

    First temperature, then top-k, then top-p (Holtzman et al. 2019, arXiv 1904.09751). Temperature 0 is greedy; ties at
    the k-th place are all kept; top-p keeps the character with which the probability first reaches p. `top_k` 0 or None
    and `top_p` None keep everything. Raises ValueError that names a parameter outside its range.
    """
    temperature = SAMPLING["temperature"].check("temperature", temperature)
    top_k = SAMPLING["top_k"].check("top_k", top_k or 0)
    top_p = SAMPLING["top_p"].check("top_p", 1.0 if top_p is None else top_p)
    if temperature == 0:
        first = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, first, 0.0)
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)  # or half a precision would round it to 0
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0, so a tiny temperature cannot overflow
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share  # what the likelier characters already hold
        out = (before >= top_p).index_fill(-1, torch.zeros(1, dtype=torch.long, device=logits.device), False)
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    return logits


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(b v) -> (b): one character per row, drawn from the softmax of the logits."""
    odds = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return torch.multinomial(odds, 1, generator=generator).squeeze(-1)


def check_length(n: int) -> int:
    """-> n, or a ValueError: how many characters to write is a whole number, zero or more."""
    return LENGTH.check("length", n)


def check_sizes(config, *names: str, **least: int) -> None:
    """Raise a ValueError for a field of a config below 1, or below its own least, and for a dropout that is not a share. None passes."""
    for name, low in (dict.fromkeys(names, 1) | least).items():
        value = getattr(config, name)
        if value is not None and not (isinstance(value, int) and value >= low):
            raise ValueError(f"{name} is a whole number from {low} up; got {value!r}")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name, 0.0) <= 1:
            raise ValueError(f"{name} is a number from 0 to 1; got {getattr(config, name)!r}")


def check_heads(width: int, heads: int, *, rotary: bool) -> None:
    """Raise a ValueError for a width that does not split into heads, or, where positions are rotary, into heads of pairs of channels."""
    if width % heads:
        raise ValueError(f"a width of {width} cannot be cut into {heads} equal heads")
    if rotary and width // heads % 2:
        raise ValueError(
            f"rotary positions turn channels in pairs; {heads} heads of a width of {width} have {width // heads} channels each"
        )


PIECE = 2048  # a long prompt is read in pieces of this many characters, so that its logits never fill the memory


def left_to_right(model: Reader, prompt: Tensor, n: int, *, temperature=1.0, top_k=None, top_p=None, generator=None) -> Iterator[Draft]:
    """(b t) -> drafts that grow by one character each, all of it settled.

    The prompt is read once; after that each character costs one call of `read` with the state. When the state is full,
    the last half of its window is read anew, so that a long text pays for one rereading per half window. What of the prompt
    lies before the characters that are held is lost, at the start or with a rereading: each draft's note says how many of
    its characters are `forgotten` by then.
    An empty prompt starts from character 0, the newline of a sorted vocabulary.
    Raises ValueError for ids that are not characters of the model and for settings out of range, before any work.
    """
    n = check_length(n)
    filter_logits(torch.zeros(1), temperature=temperature, top_k=top_k, top_p=top_p)
    prompt = model.check_ids(prompt)
    if prompt.shape[1] == 0:
        prompt = prompt.new_zeros(len(prompt), 1)
    return _write(model, prompt.to(model.device), n, temperature, top_k, top_p, generator)


@torch.no_grad()
def _write(model, prompt, n, temperature, top_k, top_p, generator):
    plain = temperature == 1 and not top_k and top_p in (None, 1)
    start = prompt.shape[1]
    page = torch.cat([prompt, prompt.new_zeros(len(prompt), n)], 1)
    read_to = max(0, start - model.memory) if model.memory else 0
    state, held, note = None, 0, {"forgotten": read_to} if read_to else {}
    yield Draft(page[:, :start], start, note)
    for end in range(start, start + n):
        if model.memory and held + end - read_to > model.memory:
            state, held, read_to = None, 0, end - max(1, model.memory // 2)
            note = {"forgotten": min(read_to, start)}
        with evaluating(model):
            for piece in page[:, read_to:end].split(PIECE, 1):
                logits, state = model.read(piece, state)
        held, read_to = held + end - read_to, end
        last = logits[:, -1]
        if temperature == 0:
            page[:, end] = last.argmax(-1)
        else:
            odds = last if plain else filter_logits(last, temperature=temperature, top_k=top_k, top_p=top_p)
            page[:, end] = sample(odds, generator)
        yield Draft(page[:, : end + 1], end + 1, note | model.notes(state))


@contextmanager
def evaluating(model: nn.Module):
    """Without dropout inside the block, as before after it. A stream that pauses half-way leaves training undisturbed."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def generate(model: LanguageModel, prompt: str, n: int = 200, *, seed: int | None = None, **settings) -> str:
    """Text in, text out: the prompt and `n` more characters by a model that has its `vocabulary`.

    `settings` are temperature, top_k, top_p and what the model itself offers. With a `seed` the text is always the same.
    Ctrl-C, or an interrupted kernel: what has settled by then is returned, with a warning that says so. A prompt that the
    window cannot hold loses its beginning unread, with a warning too.
    Raises ValueError for characters outside the vocabulary and for settings out of range.
    """
    first = last = None
    try:
        for last in stream(model, prompt, n, seed=seed, **settings):
            first = first or last
    except KeyboardInterrupt:
        if first is None:
            raise
        warnings.warn(f"interrupted: the text ends after {last.settled:,} characters, prompt included", stacklevel=2)
    if lost := first.note.get("forgotten"):
        warnings.warn(f"the window holds {model.config.window} characters: the first {lost:,} of the prompt are not read", stacklevel=2)
    return model.vocabulary.decode(last.ids[0, : last.settled])


def stream(model: LanguageModel, prompt: str, n: int = 200, *, seed: int | None = None, **settings) -> Iterator[Draft]:
    """Text in, drafts out: the same, while it is being written. An empty prompt is read as a newline."""
    vocabulary, settings = vocabulary_of(model), check_settings(model, settings)
    generator = None
    if seed is not None:
        generator = torch.Generator(model.device).manual_seed(SEED.check("seed", seed))
    ids = vocabulary.encode(prompt or ("\n" if "\n" in vocabulary.characters else vocabulary.characters[0]))
    return model.generate(ids[None], n, generator=generator, **settings)


def vocabulary_of(model: LanguageModel) -> Vocabulary:
    """-> the characters that a model knows. Raises ValueError for one that has not been told."""
    if not isinstance(getattr(model, "vocabulary", None), Vocabulary):
        raise ValueError("this model has no vocabulary yet: load or train it, or set model.vocabulary")
    return model.vocabulary


def check_settings(model: LanguageModel, settings: dict) -> dict:
    """-> the settings, each in its type. Raises ValueError that names one this model does not have, or one out of range."""
    known = SAMPLING | model.settings
    for name in settings:
        if name not in known:
            raise ValueError(f"{type(model).__name__} has no setting {name!r}; it has {', '.join(known)}")
    return {name: known[name].check(name, value) if value is not None else None for name, value in settings.items()}
