"""What text looks like from outside: words that exist, borrowed passages, repetition, and what a judge says that is no network.

The measures read strings and know of no model; `samples` and `written` ask one for them. `Corpus` holds what is remembered of
the training text.
"""

import functools
import math
import random
import re
from collections import Counter, defaultdict

import torch

WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
ORDER = 6  # of the judge: how many characters before it sees
COPIED = 20  # characters in a row that count as copied
SAMPLES, LENGTH, TEMPERATURES = (
    8,
    400,
    (0.8, 1.0),
)  # texts that a model is measured by, and their characters


class Corpus:
    """A training text, prepared for questions: its words, its runs of characters, and a judge that was counted, not trained."""

    def __init__(self, text: str):
        self.text = text
        self.words = {word.lower() for word in words(text)}
        self.runs = {text[i : i + COPIED] for i in range(len(text) - COPIED + 1)}
        self.symbols = len(set(text))
        self.counts: list[dict[str, Counter]] = []
        for k in range(ORDER + 1):
            after: dict[str, Counter] = defaultdict(Counter)
            for i in range(k, len(text)):
                after[text[i - k : i]][text[i]] += 1
            self.counts.append(dict(after))
        self.totals = [
            {context: sum(seen.values()) for context, seen in table.items()}
            for table in self.counts
        ]

    def judge(self, text: str, start: int = 0) -> float:
        """-> nats per character of text[start:]: interpolated n-grams with Witten and Bell's weights (1991), down to uniform."""
        nats = 0.0
        for i in range(start, len(text)):
            p = 1 / self.symbols
            for k in range(min(ORDER, i) + 1):
                context = text[i - k : i]
                seen = self.counts[k].get(context)
                if seen is None:
                    break
                kinds, total = len(seen), self.totals[k][context]
                p = (seen[text[i]] + kinds * p) / (total + kinds)
            nats -= math.log(p)
        return nats / max(1, len(text) - start)

    def existing(self, text: str) -> float:
        """-> the share of the text's words that are words of the training text; its first and last word may be cut and do not count."""
        whole = words(text)[1:-1]
        return sum(word.lower() in self.words for word in whole) / len(whole) if whole else 0.0

    def copied(self, text: str) -> float:
        """-> the share of the text's runs of 20 characters that stand in the training text."""
        runs = [text[i : i + COPIED] for i in range(len(text) - COPIED + 1)]
        return sum(run in self.runs for run in runs) / len(runs) if runs else 0.0

    def longest_copy(self, text: str) -> int:
        """-> the length of the longest passage that stands in the training text."""
        best = 0
        for i in range(len(text)):
            while i + best < len(text) and text[i : i + best + 1] in self.text:
                best += 1
        return best


@functools.lru_cache(1)
def counted(train: str) -> Corpus:
    """-> the Corpus of a text, made once: to count all its runs takes ten seconds, and a report asks for it several times."""
    return Corpus(train)


def samples(model, vocabulary, count: int, n: int, temperature: float, seed: int = 0) -> list[str]:
    """-> `count` texts of n characters, each begun from a newline, which is left out."""
    start = vocabulary.encode("\n").expand(count, 1)
    *_, draft = model.generate(
        start, n, temperature=temperature, generator=torch.Generator(model.device).manual_seed(seed)
    )
    return [vocabulary.decode(row[1:]) for row in draft.ids]


def written(
    model, text, count: int = SAMPLES, n: int = LENGTH
) -> tuple[dict[str, dict], dict[str, str]]:
    """-> by temperature: what `count` texts of n characters look like (`report`), and the first of them. Keys are text, as in JSON."""
    corpus, told, first = counted(text.vocabulary.decode(text.train)), {}, {}
    for temperature in TEMPERATURES:
        texts = samples(model, text.vocabulary, count, n, temperature)
        told[str(temperature)], first[str(temperature)] = (
            report(texts, corpus, reference(text)),
            texts[0],
        )
    return told, first


def real(text, count: int = SAMPLES, n: int = LENGTH) -> dict:
    """-> what pieces of the validation part look like: a model's measures, asked of the real thing."""
    first = text.vocabulary.decode(text.val[: len(text.val) // 2])
    pieces = [first[i * len(first) // count :][:n] for i in range(count)]
    return report(pieces, counted(text.vocabulary.decode(text.train)), reference(text))


def reference(text) -> str:
    """-> the text that others should resemble: the validation part's second half, so that pieces of the first are not in it."""
    return text.vocabulary.decode(text.val[len(text.val) // 2 :])


def words(text: str) -> list[str]:
    return WORD.findall(text)


def ngrams(text: str, n: int) -> Counter:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def divergence(a: Counter, b: Counter) -> float:
    """-> Jensen-Shannon divergence of two tables of counts, in nats: 0 for equal shares, ln 2 for nothing in common."""
    n, m, out = a.total(), b.total(), 0.0
    for key in a.keys() | b.keys():
        p, q = a[key] / n, b[key] / m
        out += sum(x * math.log(2 * x / (p + q)) for x in (p, q) if x) / 2
    return out


def repeated(text: str, n: int = 4) -> float:
    """-> the share of runs of n words that stood in the same text before."""
    said = [word.lower() for word in words(text)]
    runs = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def in_form(text: str, longest: int = 66) -> float:
    """-> the share of lines that a page of the plays could have: not longer than its longest verse, no blank at either end."""
    lines = text.split("\n")[1:-1]
    return (
        sum(len(line) <= longest and line == line.strip() for line in lines) / len(lines)
        if lines
        else 0.0
    )


def interval(values: list[float], *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """-> the mean, and where 95 % of the means of values drawn anew lie (percentile bootstrap).

    From few values it is too narrow for a 95 % interval of the true mean: eight normal ones cover it 88 % of the time.
    """
    dice = random.Random(seed)
    means = sorted(sum(dice.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return {
        "mean": sum(values) / len(values),
        "low": means[int(0.025 * draws)],
        "high": means[int(0.975 * draws)],
    }


def report(samples: list[str], corpus: Corpus, reference: str) -> dict:
    """-> every measure of these samples, means with intervals over the samples; `reference` is the text to resemble."""
    per_text = {
        "words that exist": corpus.existing,
        "judge, nats per character": corpus.judge,
        "copied runs of 20": corpus.copied,
        "repeated runs of 4 words": repeated,
        "lines in form": in_form,
    }
    rows: dict = {
        name: interval([measure(text) for text in samples]) for name, measure in per_text.items()
    }
    rows["longest copy"] = max(corpus.longest_copy(text) for text in samples)
    rows["trigram divergence"] = divergence(
        sum((ngrams(text, 3) for text in samples), Counter()), ngrams(reference, 3)
    )
    said = [word.lower() for text in samples for word in words(text)]
    rows["different words"] = len(set(said)) / max(1, len(said))
    return rows
