"""What every model of this book can do: the protocol, the draft, and the two ways to write.

A model reads integer characters, `ids`, and answers with a likelihood or with text. Text comes as a
stream of whole drafts rather than of single characters, so that models that write left to right and
models that denoise a whole page can stand behind the same screen.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from . import machine
from .sampling import SAMPLING, Sampling, filter_logits, sample
from .settings import InputError, Setting
from .text import Vocabulary

LENGTH = Setting(0, "characters to write", low=0, high=10_000_000)
SEED = Setting(0, "the same seed gives the same text", low=0, high=2**62)
DRAWS = Setting(4, "masks, or noise levels, by which a page's bound is estimated", low=1)
Ids = Integer[Tensor, "b t"]  # uint8 too
Nats = Float[Tensor, "b t-1"]  # of `ids[:, 1:]`
Loss = tuple[Float[Tensor, ""], dict[str, Tensor]]
# a long prompt is read this many characters at once, so that its logits never fill the memory
READ_AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class Draft:
    """One frame of writing: the prompt and everything proposed so far.

    The first `settled` characters of every row will not change again; `note` is a small dict to
    show beside the text; `forgotten` counts the characters of the prompt that the model's window
    has no room for. `generate` begins with the prompt. Left to right, every later frame is one
    character longer. Where a page is written at once, a frame holds the text up to the end of that
    page. The last frame is the answer. A draft belongs to its receiver: nothing else uses its
    `ids`.
    """

    ids: Ids
    settled: int
    note: dict = field(default_factory=dict)
    forgotten: int = 0


class LanguageModel(nn.Module):
    """The protocol that trainer, chat and benchmark speak. A new model subclasses this and passes
    test_contract.py.

    `config` is a frozen dataclass with at least `vocabulary` and `window`. `exact` says whether
    `nll` is an exact likelihood or an upper bound. `settings` are the extra keyword arguments of
    `generate`, of `inspect`, and, if `exact`, of `nll`. `no_decay` are endings of the
    names of parameters without weight decay. `vocabulary` has the characters, and `card` says where
    the weights are from: None until the model is trained or loaded.
    """

    exact = True
    settings: dict[str, Setting] = {}
    no_decay: ClassVar[tuple[str, ...]] = ()
    vocabulary: Vocabulary | None = None
    card: dict | None = None

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.lock = _Lock()

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers()), torch.empty(0)).device

    @cached_property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def draw(self, ids: Ids, *, generator: Generator | None = None) -> dict[str, Any]:
        """What `loss` draws for a whole batch, dropout aside: tensors with the batch as first axis.

        Cut with the batch, the pieces of it make one objective: the mean over equal pieces is that
        of the whole.
        """
        return {}

    def loss(self, ids: Ids, draws: dict[str, Any] | None = None) -> Loss:
        """A scalar to minimise, in nats per character, and its parts, detached, by honest names."""
        raise NotImplementedError

    def observed(self) -> list[Tensor]:
        """Sums that `loss` adds to while training; processes add theirs up before `absorb`."""
        return []

    def absorb(self) -> None:
        """Once per optimizer step, after the batch's gradients: use what `loss` has observed."""

    def nll(self, ids: Ids, *, generator: Generator | None = None) -> Nats:
        """Negative log-likelihood in nats of each of `ids[:, 1:]`; a bound if not `exact`."""
        raise NotImplementedError

    def generate(
        self,
        prompt: Ids,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generator | None = None,
    ) -> Iterator[Draft]:
        """Drafts, the last of which holds the prompt and `n` more characters, all settled."""
        raise NotImplementedError

    def inspect(
        self, ids: Integer[Tensor, "1 t"], *, generator: Generator | None = None, **settings: Any
    ) -> dict[str, Tensor]:
        """What it shows of each character of a text, by name: numbers (t) or maps (... t s)."""
        check_settings(self, settings, sampling=False)
        return {}

    def check_ids(self, ids: Any, *, look: bool = True) -> Int[Tensor, "b t"]:
        """-> ids as int64. Raises InputError that says why they are not this model's characters.

        To look at ids on a GPU makes the program wait for it: without `look`, only those on a CPU
        are looked at. `loss` does not look where it is given draws: the trainer has, once.
        """
        if not isinstance(ids, Tensor):
            raise InputError(
                f"ids are a tensor of whole numbers of shape (b, t); got a {type(ids).__name__}"
            )
        fractions = ids.is_floating_point() or ids.is_complex()
        if ids.ndim != 2 or fractions or ids.dtype == torch.bool:  # as a mask in place of a text
            raise InputError(
                f"ids are whole numbers of shape (b, t); got {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )
        ids = ids.long()  # torch knows no least or greatest of uint16
        if (look or ids.is_cpu) and not torch.compiler.is_compiling() and ids.numel():
            with suppress(RuntimeError):  # inside vmap, and on meta, nobody can look
                low, high = int(ids.min()), int(ids.max())
                last = self.config.vocabulary - 1
                if not 0 <= low <= high <= last:
                    raise InputError(f"ids lie in 0..{last}; got {low}..{high}")
        return ids


def check_pairs(ids: Ids) -> Ids:
    """-> ids. Raises InputError if none of their characters is to be predicted."""
    if not ids[:, 1:].numel():
        raise InputError(
            "a loss is of characters that others come before, (b, t) from (1, 2) on; got ids of "
            f"shape {tuple(ids.shape)}"
        )
    return ids


class Reader(LanguageModel):
    """A model that reads from left to right: subclasses write `read`; all else follows from it."""

    @property
    def max_context(self) -> int | None:
        """How many characters one state can hold; None means any number."""
        return self.config.window

    def read(self, ids: Ids, state: Any = None) -> tuple[Float[Tensor, "b t v"], Any]:
        """Logits of the character after every new position, and the state: the model's own affair.

        The inner loop of writing: ids are taken as they come. `loss`, `nll`, `generate`, `inspect`
        and a call of the model check them. A model with `settings` takes them and a `generator`.
        """
        raise NotImplementedError

    def reading(self, own: dict[str, Any], generator: Generator | None) -> Callable:
        """-> `read` with the model's own settings, checked already, for one call or many."""
        return partial(self.read, generator=generator, **own) if self.settings else self.read

    def notes(self, state: Any) -> dict:
        """What the last call of `read` has to show about its last position; goes on the draft."""
        return {}

    def forward(self, ids: Ids) -> Float[Tensor, "b t v"]:
        return self.read(self.check_ids(ids))[0]

    def nll(self, ids: Ids, *, generator: Generator | None = None, **settings: Any) -> Nats:
        """`settings` are those of `read`."""
        ids = self.check_ids(ids)
        own = check_settings(self, settings, sampling=False)
        return cross_entropy(self.reading(own, generator)(ids[:, :-1])[0], ids[:, 1:])

    def loss(self, ids: Ids, draws: dict[str, Any] | None = None) -> Loss:
        """`nats_per_char`; with `targets` (b t v) among the draws, cross-entropy with those."""
        ids = check_pairs(self.check_ids(ids, look=draws is None))
        logits, _ = self.read(ids[:, :-1])
        nats = cross_entropy(logits, ids[:, 1:]).mean()
        targets = (draws or {}).get("targets")
        loss = nats if targets is None else cross_entropy(logits, targets[:, 1:]).mean()
        return loss, {"nats_per_char": nats.detach()}

    def generate(
        self, prompt: Ids, n: int, *, generator: Generator | None = None, **settings: Any
    ) -> Iterator[Draft]:
        """`settings` are temperature, top_k, top_p, and those of `read`.

        An empty prompt starts from character 0, the newline where no tab sorts before it. Raises
        InputError for ids that are not characters of the model, and for a setting or a length out
        of range, before any work.
        """
        sampling, own = split_settings(self, settings)
        text, start = _with_room(self, prompt, n)
        return left_to_right(self, text, start, sampling, generator, self.reading(own, generator))


def cross_entropy(
    logits: Float[Tensor, "b t v *more"],
    targets: Integer[Tensor, "b t *more"] | Float[Tensor, "b t v *more"],
) -> Float[Tensor, "b t *more"]:
    """Nats of each character, in float32 at least: of the one that `targets` says, or on average by
    the probabilities that it gives.
    """
    logits = logits.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32))
    if targets.is_floating_point():
        targets = targets.transpose(1, 2).to(logits)
    return F.cross_entropy(logits, targets, reduction="none")


# ------------------------------------------------------------------------------------------ writing


@torch.no_grad()
def left_to_right(
    model: Reader,
    text: Ids,
    start: int,
    sampling: Sampling,
    generator: Generator | None,
    read: Callable,
) -> Iterator[Draft]:
    """Write over `text` from `start` on: drafts that grow by one character each, all settled.

    The prompt is read once; after that each character costs one call of `read` with the state, and
    a copy of the text for its draft: 10 microseconds at 10,000 characters, 100 at 100,000. When the
    state is full, the last half of its window is read anew, so that a long text pays for one
    rereading per half window; what lies before is forgotten, and each draft counts how much of the
    prompt that is.
    """
    unfiltered = sampling == Sampling()
    context = model.max_context
    state = None
    held = 0  # how many characters the state holds
    read_to = max(0, start - context) if context else 0  # the first one that is not read yet
    forgotten = read_to  # how many of the prompt the state knows nothing of
    yield Draft(text[:, :start].clone(), start, forgotten=forgotten)
    for end in range(start, text.shape[1]):
        if context and held + end - read_to > context:  # full: begin anew with half a window
            state = None
            held = 0
            read_to = end - max(1, context // 2)
            forgotten = min(read_to, start)
        with evaluating(model, len(text) * (end - read_to)):
            while end - read_to > READ_AT_ONCE:
                _, state = read(text[:, read_to : read_to + READ_AT_ONCE], state)
                held += READ_AT_ONCE
                read_to += READ_AT_ONCE
            logits, state = read(text[:, read_to:end], state)
            last = logits[:, -1]
            if sampling.temperature == 0:  # as filter_logits and sample would, without a draw
                text[:, end] = last.argmax(-1)
            else:
                last = last if unfiltered else filter_logits(last, **vars(sampling))
                text[:, end] = sample(last, generator)
        held += end - read_to
        read_to = end
        yield Draft(text[:, : end + 1].clone(), end + 1, model.notes(state), forgotten)


def page_by_page(
    model: LanguageModel,
    prompt: Ids,
    n: int,
    page: int,
    write: Callable[[Tensor, Tensor], Iterator[Draft]],
) -> Iterator[Draft]:
    """Drafts of a text written `page` characters at once, each page given the text before it.

    `write(ids, mask)` yields drafts of one window (b t), in which the positions where `mask` (b t)
    is True are to be written. The window has room for `config.window + 1` characters; what lies
    before is forgotten. Raises InputError for ids that are not characters of the model and for a
    length out of range, before any work.
    """
    text, start = _with_room(model, prompt, n)
    return _page_by_page(text, start, page, model.config.window + 1, write)


def _page_by_page(
    text: Ids, start: int, page: int, room: int, write: Callable[[Tensor, Tensor], Iterator[Draft]]
) -> Iterator[Draft]:
    first_end = min(start + page, text.shape[1])
    forgotten = max(0, first_end - room) if first_end > start else 0
    yield Draft(text[:, :start].clone(), start, forgotten=forgotten)
    for first in range(start, text.shape[1], page):
        end = min(first + page, text.shape[1])
        begin = max(0, end - room)
        mask = torch.zeros(len(text), end - begin, dtype=torch.bool, device=text.device)
        mask[:, first - begin :] = True
        for draft in write(text[:, begin:end], mask):
            text[:, begin:end] = draft.ids
            whole = text[:, :end].clone()
            yield replace(
                draft, ids=whole, settled=begin + draft.settled, forgotten=min(begin, start)
            )


def _with_room(model: LanguageModel, prompt: Any, n: int) -> tuple[Tensor, int]:
    """-> the prompt and `n` zeros to write over, on the model's device; the prompt's length."""
    n = LENGTH.check("length", n)
    prompt = model.check_ids(prompt)
    if prompt.shape[1] == 0:
        prompt = prompt.new_zeros(len(prompt), 1)
    text = torch.cat([prompt, prompt.new_zeros(len(prompt), n)], 1)
    return text.to(model.device), prompt.shape[1]


def leading(true: Bool[Tensor, "b t"]) -> Int[Tensor, "b"]:
    """-> how many positions from the left are True, in each row."""
    return true.long().cumprod(-1).sum(-1)


class _Lock:
    """A model's lock: one thread at a time. A copy, or another process's, gets one of its own."""

    def __init__(self) -> None:
        self.rlock = threading.RLock()

    def __reduce__(self):
        return (_Lock, ())


@contextmanager
def exclusive(model: LanguageModel, characters: float = math.inf) -> Iterator[None]:
    """No other thread trains or asks the model inside the block: a training step, or one step of
    writing. Few characters are one thread's work.
    """
    with model.lock.rlock, machine.threads_for(model.num_parameters * characters):
        yield


@contextmanager
def evaluating(model: LanguageModel, characters: float = math.inf) -> Iterator[None]:
    """A model that is in training is in eval mode inside the block, undisturbed; after it every
    module is as before.
    """
    with exclusive(model, characters):
        training = [m for m in model.modules() if m.training] if model.training else []
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


# -------------------------------------------------------------------------------- text in, text out


def generate(
    model: LanguageModel, prompt: str, n: int = 200, *, seed: int | None = None, **settings: Any
) -> str:
    """Text in, text out: the prompt and `n` more characters by a model that has its `vocabulary`.

    `settings` are temperature, top_k, top_p and what the model itself offers. With a `seed` the
    text is always the same. Ctrl-C, or an interrupted kernel: what has settled by then is returned,
    with a warning that says so. A prompt that the window cannot hold loses its beginning unread,
    with a warning too. Raises InputError for characters outside the vocabulary and for settings out
    of range.
    """
    first = last = None
    try:
        for last in stream(model, prompt, n, seed=seed, **settings):
            first = first or last
    except KeyboardInterrupt:
        if last is None:
            raise
        warnings.warn(
            f"interrupted: the text ends after {last.settled:,} characters, prompt included",
            stacklevel=2,
        )
    assert first is not None and last is not None  # the prompt is a draft
    if first.forgotten:
        warnings.warn(
            f"the window holds {model.config.window} characters: the first "
            f"{first.forgotten:,} of the prompt are not read",
            stacklevel=2,
        )
    return vocabulary_of(model).decode(last.ids[0, : last.settled])


def stream(
    model: LanguageModel, prompt: str, n: int = 200, *, seed: int | None = None, **settings: Any
) -> Iterator[Draft]:
    """Text in, drafts out: the same while it is written.

    An empty prompt is read as a newline; by a model that has none, as its first character.
    """
    vocabulary = vocabulary_of(model)
    newline = "\n" if "\n" in vocabulary.characters else vocabulary.characters[0]
    ids = vocabulary.encode(newline if prompt == "" else prompt)
    return model.generate(ids[None], n, generator=seeded(model, seed), **settings)


def seeded(model: LanguageModel, seed: int | None) -> Generator | None:
    """-> a generator on the model's device, or None for no seed. Raises InputError out of range."""
    if seed is None:
        return None
    return Generator(model.device).manual_seed(SEED.check("seed", seed))


def vocabulary_of(model: LanguageModel) -> Vocabulary:
    """-> the characters that a model knows. Raises InputError for one that has none yet, or those
    of another model.
    """
    if not isinstance(model, LanguageModel):
        raise InputError(
            f"a model comes first, as irann.load gives it; got {model!r}: irann.load(NAME) "
            "loads one"
        )
    if not isinstance(model.vocabulary, Vocabulary):
        raise InputError(
            "this model has no vocabulary yet: load or train it, or set model.vocabulary"
        )
    if len(model.vocabulary) != model.config.vocabulary:
        raise InputError(
            f"the model was made for {model.config.vocabulary} characters, its vocabulary has "
            f"{len(model.vocabulary)}"
        )
    return model.vocabulary


def check_settings(
    model: LanguageModel, settings: dict[str, Any], *, sampling: bool = True
) -> dict[str, Any]:
    """-> the settings, each in its type; None means the default, and is left out. Raises InputError
    that names one out of range, or one that neither the model nor, with `sampling`, the draw has.
    """
    known = (SAMPLING if sampling else {}) | model.settings
    for name in settings:
        if name not in known:
            what = f"setting {name!r}" if sampling else f"setting {name!r} for reading"
            has = ", ".join(known) or "none"
            raise InputError(f"{type(model).__name__} has no {what}; it has {has}")
    given = {name: value for name, value in settings.items() if value is not None}
    return {name: known[name].check(name, value) for name, value in given.items()}


def split_settings(
    model: LanguageModel, settings: dict[str, Any]
) -> tuple[Sampling, dict[str, Any]]:
    """-> how characters are drawn, and all of the model's own settings. Raises InputError."""
    given = check_settings(model, settings)
    own = {name: given.pop(name, setting.default) for name, setting in model.settings.items()}
    return Sampling(**given), own
