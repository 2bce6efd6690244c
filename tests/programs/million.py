"""Every model reads a prompt of a million characters; prints how much memory that took, in kB."""

import resource

import torch

from irann import lm, shakespeare, zoo

torch.set_num_threads(1)
prompt = ("Who is there? " * 80_000)[:1_000_000]
before = None
for name in sorted(zoo.MODELS, key=lambda name: name == "mamba"):
    less = {"layers": 1} if name == "mamba" else {}  # it alone reads all
    model = zoo.build(name, zoo.recipe(name, "tiny", **less)[0])
    model.vocabulary = shakespeare.load().vocabulary
    lm.generate(model, prompt[:5000], 3, seed=1)
    before = before or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for draft in lm.stream(model, prompt, 3, seed=1):
        assert draft.forgotten == 0 if name == "mamba" else draft.forgotten >= 999_900
    text = model.vocabulary.decode(draft.ids[0])
    assert text.startswith(prompt) and len(text) == 1_000_003 and draft.settled == len(text)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
