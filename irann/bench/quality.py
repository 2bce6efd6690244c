"""What text looks like from outside: words that exist, copies, a judge without network.

The measures read strings and know of no model; `samples` and `written` ask one for them. `Corpus`
holds what is remembered of the training text. Parts of a whole are fractions from 0 to 1.
"""

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..text import Text

WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
ORDER = 6  # of the judge: how many characters before it sees
COPIED = 20  # characters in a row that count as copied
SAMPLES, LENGTH = 8, 400  # texts that a model is measured by, and their characters
TEMPERATURES = (0.8, 1.0)
DRAWS = 2000  # of a bootstrap


class Corpus:
    """A training text, prepared: its words, its runs, and a judge that was counted, not trained."""

    def __init__(self, text: str):
        self.words = {word.lower() for word in words(text)}
        self.runs = set(runs(text, COPIED))
        self.symbols = len(set(text))
        self.counts = [Counter(runs(text, k + 1)) for k in range(ORDER + 1)]  # context, then next
        self.totals = Counter()  # of each context: how often something follows it
        self.kinds = Counter()  # and how many different characters do
        for grams in self.counts:
            for gram, count in grams.items():
                self.totals[gram[:-1]] += count
            self.kinds.update(gram[:-1] for gram in grams)

    def judge(self, text: str, start: int = 0) -> float:
        """-> nats per character of text[start:]: interpolated n-grams with Witten and Bell's
        weights (1991), down to uniform.
        """
        nats = 0.0
        for i in range(start, len(text)):
            p = 1 / self.symbols
            for k in range(min(ORDER, i) + 1):
                context = text[i - k : i]
                total, kinds = self.totals[context], self.kinds[context]
                if total == 0:
                    break
                p = (self.counts[k][context + text[i]] + kinds * p) / (total + kinds)
            nats -= math.log(p)
        return nats / max(1, len(text) - start)

    def existing(self, text: str) -> float | None:
        """-> the fraction of words of the training text; first and last may be cut: not counted."""
        return fraction([word.lower() in self.words for word in words(text)[1:-1]])

    def copied(self, text: str) -> float | None:
        """-> the fraction of the text's runs of 20 characters that stand in the training text."""
        return fraction([run in self.runs for run in runs(text, COPIED)])


@functools.lru_cache(1)
def counted(train: str) -> Corpus:
    """-> the Corpus of a text, made once: counting takes seconds, and a report asks repeatedly."""
    return Corpus(train)


# -------------------------------------------------------------------------- texts that are measured


def samples(
    model: Any, count: int, n: int, temperature: float, seed: int = 0, **settings: Any
) -> list[str]:
    """-> `count` texts of n characters, each begun from a newline, which is left out."""
    newline = model.vocabulary.encode("\n").expand(count, 1)
    settings["generator"] = torch.Generator(model.device).manual_seed(seed)
    *_, draft = model.generate(newline, n, temperature=temperature, **settings)
    return [model.vocabulary.decode(row[1:]) for row in draft.ids]


def written(
    model: Any, text: Text, count: int = SAMPLES, n: int = LENGTH
) -> tuple[dict[str, dict], dict[str, str]]:
    """-> by temperature (text, as in JSON): `report` of `count` texts of length n; their first."""
    corpus = counted(text.vocabulary.decode(text.train))
    rows, first = {}, {}
    for temperature in TEMPERATURES:
        texts = samples(model, count, n, temperature)
        rows[str(temperature)] = report(texts, corpus)
        first[str(temperature)] = texts[0]
    return rows, first


def real(text: Text, count: int = SAMPLES, n: int = LENGTH) -> dict:
    """-> a model's measures, of the real thing: pieces of the validation part's first half."""
    first = text.vocabulary.decode(text.val[: len(text.val) // 2])
    pieces = [first[i * len(first) // count :][:n] for i in range(count)]
    return report(pieces, counted(text.vocabulary.decode(text.train)))


def report(samples: list[str], corpus: Corpus) -> dict:
    """-> every measure: means with intervals over samples, and `different words` of all of them."""
    per_text = {
        "words that exist": corpus.existing,
        "judge, nats per character": corpus.judge,
        "copied runs of 20": corpus.copied,
    }
    rows: dict = {name: interval([of(text) for text in samples]) for name, of in per_text.items()}
    all_words = [word.lower() for text in samples for word in words(text)]
    rows["different words"] = len(set(all_words)) / len(all_words) if all_words else None
    return rows


# ----------------------------------------------------------------------------------------- measures


def words(text: str) -> list[str]:
    return WORD.findall(text)


def runs(text: str, n: int) -> list[str]:
    """-> all n characters in a row."""
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def fraction(true: list[bool]) -> float | None:
    """-> how many of a list are true; None of an empty one."""
    return sum(true) / len(true) if true else None


def interval(values: Sequence[float | None]) -> dict[str, float] | None:
    """-> the mean of what is not None, and where 95 % of the means of values drawn anew lie
    (percentile bootstrap); None of nothing.

    From few values it is too narrow for a 95 % interval of the true mean: eight normal ones cover
    it 88 % of the time.
    """
    generator = random.Random(0)
    known = [value for value in values if value is not None]
    if not known:
        return None
    k = len(known)
    means = sorted(sum(generator.choices(known, k=k)) / k for _ in range(DRAWS))
    low, high = means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS)]
    return {"mean": sum(known) / k, "low": low, "high": high}
