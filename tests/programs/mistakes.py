"""What a newcomer gets wrong in Python, without the tests' type checker: one line per mistake."""

import gc
import os
import warnings

import irann
from irann.training.distillation import soft_targets

text = irann.Text.of("to be or not to be\n" * 100)
config, recipe = irann.recipe("gpt", "tiny", vocabulary=len(text.vocabulary), steps=1)
model = irann.build("gpt", config)
MISTAKES = {
    "generate by name": lambda: irann.generate("gpt", "ROMEO:"),
    "generate untrained": lambda: irann.generate(irann.build("gpt"), "ROMEO:"),
    "generate a number": lambda: irann.generate(irann.load("gpt"), 5),
    "generate nothing": lambda: irann.generate(irann.load("gpt"), None),
    "generate letters it does not know": lambda: irann.generate(irann.load("gpt"), "caf\u00e9"),
    "train by name": lambda: irann.train("gpt", text, recipe),
    "train on a string": lambda: irann.train(model, "text", recipe),
    "train by both": lambda: irann.train(model, text, (config, recipe)),
    "train on another text": lambda: irann.train(irann.build("gpt"), text, recipe),
    "evaluate by name": lambda: irann.evaluate("gpt", text),
    "evaluate on a string": lambda: irann.evaluate(model, "text"),
    "build heads": lambda: irann.build("gpt", heads=3),
    "build what is none": lambda: irann.build("gpt", depth=3),
    "build two": lambda: irann.build(["gpt"]),
    "learn from a model": lambda: soft_targets(model, text, 8),
    "build by a recipe": lambda: irann.build("gpt", recipe),
    "build the other": lambda: irann.build("mamba", config),
    "a typo": lambda: irann.load("gtp"),
    "a typo in a recipe": lambda: irann.recipe("mmaba"),
    "a text by its file": lambda: irann.Text.of(__file__),
    "bytes as text": lambda: irann.Text.of(b"bytes"),
    "save without a vocabulary": lambda: irann.save(irann.build("gpt"), "there"),
    "save over something": lambda: irann.save(irann.load("gpt"), os.path.dirname(__file__)),
}
for name, mistake in MISTAKES.items():
    try:
        mistake()
        print(f"{name}: nothing was said")
    except irann.InputError as error:
        print(f"{name}: {error}")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ticks = irann.train(model, text, recipe)
    print(f"shown: {ticks!r}")
    del ticks
    gc.collect()
print(f"never gone through: {caught[-1].message}")
print(f"a chat: {irann.Chat('gtp')!r}")
assert irann.build("gpt", heads=4, layers=2).config.layers == 2
