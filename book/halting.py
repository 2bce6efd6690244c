"""python book/halting.py: the halting head of the thinker that ships, trained on its own (2b).

By (13) of chapter 2 no hidden state is bent for the halting head, so it may learn when all else is
done: here with a layer of hidden units, on the training part, while the network stays as it is and
shows itself without dropout. Stopped with Ctrl-C and called again, it goes on. At the end the head
becomes part of irann/weights/thinker.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import irann
from irann import zoo
from irann.bench.races import hardware
from irann.training import Recipe, progress

NAME = "thinker"
RUN = Path("runs") / "thinker-halting"
RECIPE = Recipe(
    steps=3000,
    batch=16,
    lr=3e-3,
    weight_decay=0.01,
    warmup=50,
    ema_decay=0.998,
    save_every=500,
    precision="bfloat16",
    seed=0,
)
# what the card says of the network
KEPT = "command recipe seed step characters hardware hours curve corpus".split()


def main() -> None:
    text = irann.shakespeare.load()
    trained: Any = irann.load(NAME)
    config = dataclasses.replace(trained.config, **zoo.HALTING)
    network = {k: v for k, v in trained.state_dict().items() if not k.startswith("halt")}
    model: Any = irann.build(NAME, dataclasses.replace(config, dropout=0.0), seed=RECIPE.seed)
    model.load_state_dict(model.state_dict() | network)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("halt"))
    ticks = irann.train(model, text, RECIPE, run=RUN, resume=True)
    for tick in progress(ticks, RECIPE.steps):
        if tick.validation is not None:
            print(f"{tick.step:,} steps: {tick.validation:.4f} nats per character")
    seconds = json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    whole = irann.build(NAME, config)
    whole.load_state_dict(irann.load(RUN).state_dict() | network)
    whole.vocabulary = text.vocabulary
    halting = {
        "command": "python book/halting.py",
        "config": zoo.HALTING,
        "recipe": dataclasses.asdict(RECIPE),
        "hardware": hardware("cpu"),
        "hours": round(seconds / 3600, 2),
    }
    about = {key: trained.card[key] for key in KEPT}
    card = zoo.ship(whole, NAME, text, **about, halting=halting)
    print(f"{NAME}: {card['validation']:.4f} nats per character")


if __name__ == "__main__":
    main()
