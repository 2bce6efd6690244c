"""One more model for the zoo, written as anybody would write one."""

from dataclasses import dataclass

import torch
from torch import nn

from irann import zoo
from irann.lm import Reader
from irann.settings import Checked, field
from irann.training import Recipe


@dataclass(frozen=True)
class Config(Checked):
    vocabulary: int = field(65, "different characters", low=1, high=10_000)
    window: int = field(32, "characters of a training text", low=1, high=10_000)
    width: int = field(32, "of embeddings and state", low=1, high=10_000)
    dropout: float = field(0.0, "of embeddings", low=0.0, high=1.0)


class Recurrent(Reader):
    """Characters to logits by Elman's network of one layer."""

    max_context = None  # one vector holds any number of characters

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.hidden = nn.Linear(config.width, config.width)
        self.head = nn.Linear(config.width, config.vocabulary)

    def read(self, ids, state=None):
        x = self.drop(self.embedding(ids))
        h = x.new_zeros(len(ids), self.config.width) if state is None else state
        states = [x[:, :0]]
        for x_t in x.unbind(1):
            h = torch.tanh(x_t + self.hidden(h))
            states.append(h[:, None])
        return self.head(torch.cat(states, 1)), h


TINY = Config(), Recipe(steps=100, evaluate_every=50)
SIXTH = zoo.Entry(Recurrent, Config, {"tiny": TINY, "demo": TINY})
