"""A training that rests between two steps, its generator alive, waits for whatever comes."""

import time
from itertools import islice

from irann import shakespeare, zoo
from irann.training import train

config, recipe = zoo.recipe("gpt", "tiny", steps=50)
stream = train(zoo.build("gpt", config), shakespeare.load(), recipe)
print(len(list(islice(stream, 3))), flush=True)
time.sleep(60)
