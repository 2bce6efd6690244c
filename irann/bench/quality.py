"""What text looks like from outside: existing words, copies, repetition, a judge without network.

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

from ..text import Text, Vocabulary

WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
ORDER = 6  # of the judge: how many characters before it sees
COPIED = 20  # characters in a row that count as copied
LONGEST_VERSE = 66
SAMPLES, LENGTH = 8, 400  # texts that a model is measured by, and their characters
TEMPERATURES = (0.8, 1.0)


class Corpus:
    """A training text, prepared: its words, its runs, and a judge that was counted, not trained."""

    def __init__(self, text: str):
        self.text = text
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

    def existing(self, text: str) -> float:
        """-> the fraction of words of the training text; first and last may be cut: not counted."""
        return fraction([word.lower() in self.words for word in words(text)[1:-1]])

    def copied(self, text: str) -> float:
        """-> the fraction of the text's runs of 20 characters that stand in the training text."""
        return fraction([run in self.runs for run in runs(text, COPIED)])

    def longest_copy(self, text: str) -> int:
        """-> the length of the longest passage that stands in the training text."""
        best = 0
        for i in range(len(text)):
            while i + best < len(text) and text[i : i + best + 1] in self.text:
                best += 1
        return best


@functools.lru_cache(1)
def counted(train: str) -> Corpus:
    """-> the Corpus of a text, made once: counting takes seconds, and a report asks repeatedly."""
    return Corpus(train)


# -------------------------------------------------------------------------- texts that are measured


def samples(
    model: Any, vocabulary: Vocabulary, count: int, n: int, temperature: float, seed: int = 0
) -> list[str]:
    """-> `count` texts of n characters, each begun from a newline, which is left out."""
    newline = vocabulary.encode("\n").expand(count, 1)
    generator = torch.Generator(model.device).manual_seed(seed)
    *_, draft = model.generate(newline, n, temperature=temperature, generator=generator)
    return [vocabulary.decode(row[1:]) for row in draft.ids]


def written(
    model: Any, text: Text, count: int = SAMPLES, n: int = LENGTH
) -> tuple[dict[str, dict], dict[str, str]]:
    """-> by temperature (text, as in JSON): `report` of `count` texts of length n; their first."""
    corpus = counted(text.vocabulary.decode(text.train))
    rows, first = {}, {}
    for temperature in TEMPERATURES:
        texts = samples(model, text.vocabulary, count, n, temperature)
        rows[str(temperature)] = report(texts, corpus, reference(text))
        first[str(temperature)] = texts[0]
    return rows, first


def real(text: Text, count: int = SAMPLES, n: int = LENGTH) -> dict:
    """-> what pieces of the validation part look like: a model's measures, of the real thing."""
    first = text.vocabulary.decode(text.val[: len(text.val) // 2])
    pieces = [first[i * len(first) // count :][:n] for i in range(count)]
    return report(pieces, counted(text.vocabulary.decode(text.train)), reference(text))


def reference(text: Text) -> str:
    """-> the text to resemble: validation's second half, so that `real`'s pieces are not in it."""
    return text.vocabulary.decode(text.val[len(text.val) // 2 :])


def report(samples: list[str], corpus: Corpus, reference: str) -> dict:
    """-> every measure, means with intervals over samples; `reference`: the text to resemble."""
    per_text = {
        "words that exist": corpus.existing,
        "judge, nats per character": corpus.judge,
        "copied runs of 20": corpus.copied,
        "repeated runs of 4 words": repeated,
        "lines in form": in_form,
    }
    rows: dict = {name: interval([of(text) for text in samples]) for name, of in per_text.items()}
    rows["longest copy"] = max(corpus.longest_copy(text) for text in samples)
    trigrams = Counter(run for text in samples for run in runs(text, 3))
    rows["trigram divergence"] = divergence(trigrams, Counter(runs(reference, 3)))
    all_words = [word.lower() for text in samples for word in words(text)]
    rows["different words"] = len(set(all_words)) / max(1, len(all_words))
    return rows


# ----------------------------------------------------------------------------------------- measures


def words(text: str) -> list[str]:
    return WORD.findall(text)


def runs(items: Sequence, n: int) -> list:
    """-> all n items in a row, of a text or a list."""
    return [items[i : i + n] for i in range(len(items) - n + 1)]


def fraction(true: list[bool]) -> float:
    return sum(true) / len(true) if true else 0.0


def divergence(a: Counter, b: Counter) -> float:
    """-> Jensen-Shannon divergence of counts, in nats: 0 for equal fractions, ln 2 if disjoint."""
    n = a.total()
    m = b.total()
    nats = 0.0
    for key in a.keys() | b.keys():
        p, q = a[key] / n, b[key] / m
        nats += sum(x * math.log(2 * x / (p + q)) for x in (p, q) if x) / 2
    return nats


def repeated(text: str, n: int = 4) -> float:
    """-> the fraction of runs of n words that stood in the same text before."""
    found = [tuple(run) for run in runs([word.lower() for word in words(text)], n)]
    return 1 - len(set(found)) / len(found) if found else 0.0


def in_form(text: str) -> float:
    """-> the fraction of lines as in the plays: within the longest verse, no blank at an end."""
    lines = text.split("\n")[1:-1]
    return fraction([len(line) <= LONGEST_VERSE and line == line.strip() for line in lines])


def interval(values: list[float], *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """-> the mean, and where 95 % of the means of values drawn anew lie (percentile bootstrap).

    From few values it is too narrow for a 95 % interval of the true mean: eight normal ones cover
    it 88 % of the time.
    """
    generator = random.Random(seed)
    k = len(values)
    means = sorted(sum(generator.choices(values, k=k)) / k for _ in range(draws))
    low, high = means[int(0.025 * draws)], means[int(0.975 * draws)]
    return {"mean": sum(values) / k, "low": low, "high": high}
