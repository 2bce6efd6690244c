"""Every model learns: a text that is made of twelve words in random order, whose entropy is known,
is predicted nearly as well as anybody could, on a part that was never trained on.

A recipe or an optimizer that quietly trains worse fails here: with a third of the learning rate, or
with AdamW in Muon's place (mamba's recipe apart), the limits below are missed. They are the worst
of three seeds and 0.02 or more; the shorter the training, the more seeds differ.
"""

import dataclasses
import math
import random

import pytest

from irann import zoo
from irann.text import Text
from irann.training import train

WORDS = "ab ahfdf bbfh cbec chb dd dhhe ee fd fg fh gaehg".split()
# a space ends each word; the word itself is one of twelve
ENTROPY = math.log(len(WORDS)) / (sum(map(len, WORDS)) / len(WORDS) + 1)
# steps, and nats per character: exact, or bounds for the two that write a page at once
LIMITS = {
    "gpt": (200, 0.69),
    "thinker": (150, 0.70),
    "mamba": (100, 0.71),
    "diffusion": (300, 1.25),
    "thinker-page": (400, 1.62),
}


@pytest.fixture(scope="module")
def twelve_words() -> Text:
    draw = random.Random(0)
    return Text.of(" ".join(draw.choice(WORDS) for _ in range(6000)))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_what_can_be_predicted_is_learnt(name, twelve_words, unchecked):
    steps, limit = LIMITS[name]
    config, recipe = zoo.recipe(name, "tiny", steps=steps, evaluate_every=0)
    config = dataclasses.replace(config, vocabulary=len(twelve_words.vocabulary))
    *_, last = train(zoo.build(name, config), twelve_words, recipe)
    assert ENTROPY < last.validation < limit
