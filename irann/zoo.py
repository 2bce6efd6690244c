"""The models of this book: the one list of their names, classes, sizes, recipes, and where their weights are.

A new model is one more entry here; trainer, chat, benchmark and command line then have it. (Help texts, colours and races name
models too; a new one works without them.)
"""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import checkpoint
from .checkpoint import CheckpointError, Snapshot
from .lm import LanguageModel, stream
from .models.diffusion import Diffusion, DiffusionConfig
from .models.gpt import GPT, GPTConfig
from .models.mamba import Mamba, MambaConfig
from .models.thinker import Thinker, ThinkerConfig
from .models.thinker_page import PageThinker
from .settings import InputError
from .text import Vocabulary
from .training import Recipe, evaluate

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Entry:
    """A model: its class, its config, and by recipe's name a pair of config and recipe.

    Every model has `tiny` (seconds, for tests and for trying things), `demo` (about a minute), `full` (60 to 85 minutes of
    two cores of a CPU without AVX-512) and `gpu` (minutes of a GPU). The weights that ship were made by `gpu`; the thinker's
    on a CPU, by `full` with the steps and the precision of `gpu`.
    """

    model: type[LanguageModel]
    config: type
    recipes: dict[str, tuple[object, Recipe]]


# the thinker's form that chapter 2 arrives at: all blocks in the core, and a prior by which a further round should gain
# 0.07 nats (prior_weight times ln 2) to be as likely as the one before it
DEEP = {
    "prelude": 0,
    "core": 2,
    "round_gains": True,
    "supervision": "late",
    "prior": 0.5,
    "prior_weight": 0.1,
}

MODELS: dict[str, Entry] = {
    "gpt": Entry(
        GPT,
        GPTConfig,
        {
            "tiny": (
                GPTConfig.fast(window=32, layers=2, heads=2, width=32),
                Recipe(steps=100, batch=8, optimizer="muon", evaluate_every=50),
            ),
            "demo": (
                GPTConfig.fast(window=128, layers=4, heads=2, width=128),
                Recipe(steps=400, batch=12, lr=4e-3, optimizer="muon", muon_lr=0.02),
            ),
            "full": (
                GPTConfig.fast(window=256, layers=4, heads=3, width=192, dropout=0.15),
                Recipe(
                    steps=10_000,
                    batch=8,
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.02,
                    evaluate_every=1000,
                    save_every=250,
                ),
            ),
            "gpu": (
                GPTConfig.fast(window=256, layers=4, heads=3, width=192, dropout=0.15),
                Recipe(
                    steps=5000,
                    batch=32,
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.02,
                    average=0.998,
                    evaluate_every=500,
                ),
            ),
        },
    ),
    "thinker": Entry(
        Thinker,
        ThinkerConfig,
        {
            "tiny": (
                ThinkerConfig(window=32, width=32, rounds=3),
                Recipe(steps=100, batch=8, optimizer="muon", evaluate_every=50),
            ),
            "demo": (
                ThinkerConfig(window=128, width=128, rounds=3, **DEEP),
                Recipe(steps=250, batch=12, lr=4e-3, optimizer="muon", muon_lr=0.02),
            ),
            "full": (
                ThinkerConfig(window=256, heads=3, width=264, rounds=6, dropout=0.1, **DEEP),
                Recipe(
                    steps=2500,
                    batch=8,
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.012,
                    average=0.998,
                    evaluate_every=500,
                    save_every=250,
                ),
            ),
            "gpu": (
                ThinkerConfig(window=256, heads=3, width=264, rounds=6, dropout=0.1, **DEEP),
                Recipe(
                    steps=5500,
                    batch=8,  # with 32, and dropout 0.15, no lower than 1.420, after 16 million characters; then it learns by heart
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.012,
                    average=0.998,
                    evaluate_every=1100,
                    precision="bfloat16",
                ),
            ),
        },
    ),
    "thinker-page": Entry(
        PageThinker,
        ThinkerConfig,
        {
            "tiny": (
                ThinkerConfig(window=32, width=32, rounds=3),
                Recipe(steps=100, batch=8, optimizer="muon", evaluate_every=50),
            ),
            "demo": (
                ThinkerConfig(window=128, width=128, rounds=4),
                Recipe(steps=250, batch=12, lr=4e-3, optimizer="muon", muon_lr=0.02),
            ),
            "full": (
                ThinkerConfig(window=256, heads=3, width=264, rounds=4),
                Recipe(
                    steps=4500,
                    batch=8,
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.02,
                    evaluate_every=900,
                    save_every=250,
                ),
            ),
            "gpu": (
                ThinkerConfig(window=256, heads=3, width=264, rounds=4, dropout=0.1),
                Recipe(
                    steps=5000,
                    batch=64,
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.02,
                    average=0.998,
                    evaluate_every=1000,
                ),
            ),
        },
    ),
    "diffusion": Entry(
        Diffusion,
        DiffusionConfig,
        {
            "tiny": (
                DiffusionConfig(
                    window=32, page=16, layers=2, heads=2, width=32, channels=8, levels=200
                ),
                Recipe(steps=100, batch=8, optimizer="muon", evaluate_every=50),
            ),
            "demo": (
                DiffusionConfig(window=128, layers=4, heads=2, width=128),
                Recipe(steps=300, batch=16, lr=4e-3, optimizer="muon", muon_lr=0.02, average=0.99),
            ),
            "full": (
                DiffusionConfig(window=256, layers=4, heads=3, width=192),
                Recipe(
                    steps=9000,
                    batch=8,
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.02,
                    average=0.999,
                    evaluate_every=3000,
                    save_every=250,
                ),
            ),
            "gpu": (
                DiffusionConfig(window=256, layers=4, heads=3, width=192),
                Recipe(
                    steps=6000,
                    batch=64,
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.02,
                    average=0.999,
                    evaluate_every=1500,
                ),
            ),
        },
    ),
    "mamba": Entry(
        Mamba,
        MambaConfig,
        {
            "tiny": (
                MambaConfig.fast(window=32, layers=2, width=32, d_state=4),
                Recipe(steps=100, batch=8, optimizer="muon", evaluate_every=50),
            ),
            "demo": (
                MambaConfig.fast(window=128, layers=3, width=96),
                Recipe(steps=400, batch=12, lr=4e-3, optimizer="muon", muon_lr=0.02),
            ),
            "full": (
                MambaConfig.fast(window=256, layers=7, width=192, dropout=0.2),
                Recipe(
                    steps=1750,
                    batch=32,  # with 8, dropout 0.15 and no average 1.466 from as many characters, in 73 minutes instead
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.02,
                    average=0.998,
                    evaluate_every=250,
                    save_every=50,
                ),
            ),
            "gpu": (
                MambaConfig.fast(window=256, layers=7, width=192, dropout=0.2),
                Recipe(
                    steps=5000,
                    batch=32,
                    lr=4e-3,
                    optimizer="muon",
                    muon_lr=0.02,
                    average=0.998,
                    evaluate_every=500,
                ),
            ),
        },
    ),
}


def entry(name: str) -> Entry:
    """-> the entry of a model. Raises ValueError that lists the names there are."""
    if name not in MODELS:
        raise InputError(f"there is no model {name!r}; the models are {', '.join(MODELS)}")
    return MODELS[name]


def recipe(name: str, which: str = "demo", /, **changes) -> tuple[object, Recipe]:
    """-> config and recipe of a model, with fields of either replaced. Raises ValueError for a name or value that is none.

    Values may be strings, as from a command line; they are read as the type of what they replace.
    """
    recipes = entry(name).recipes
    if which not in recipes:
        raise InputError(f"there is no recipe {which!r} for {name}; there are {', '.join(recipes)}")
    pair, new = (
        recipes[which],
        ({}, {}),
    )  # replaced all at once: halfway, a config may not fit together
    for field, value in changes.items():
        owners = [i for i in (0, 1) if field in {f.name for f in dataclasses.fields(pair[i])}]
        if not owners:
            known = sorted(f.name for part in pair for f in dataclasses.fields(part))
            raise InputError(f"{field} is nothing that can be set; there are {', '.join(known)}")
        for i in owners:
            new[i][field] = _read(field, value, getattr(pair[i], field))
    return dataclasses.replace(pair[0], **new[0]), dataclasses.replace(pair[1], **new[1])


def _read(field: str, value, current):
    """A value, perhaps as text -> the type of the current one."""
    if current is None:
        try:
            read = json.loads(value) if isinstance(value, str) else value
            if read is None or (1 <= read < 2**31 and read == int(read)):
                return read if read is None else int(read)
        except (TypeError, ValueError, OverflowError):
            pass
        raise InputError(f"{field} is a whole number from 1 up, or null; got {value!r}")
    if isinstance(current, bool):
        spoken = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if str(value).lower() in spoken:
            return spoken[str(value).lower()]
        raise InputError(f"{field} is true or false; got {value!r}")
    kinds = {int: "a whole number", float: "a number", str: "a word"}
    try:
        read = type(current)(value)
        if isinstance(current, int) and read != float(value):
            raise InputError
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{field} is {kinds.get(type(current), type(current).__name__)}; got {value!r}"
        ) from None
    high = 1 if field.endswith("dropout") else 2**31 if isinstance(read, int) else math.inf
    if not isinstance(read, str) and not 0 <= read < high:  # NaN is not either
        raise InputError(
            f"{field} is a number from 0 {'up' if high == math.inf else f'to below {high:,}'}; got {read!r}"
        )
    return read


def build(name: str, config=None, *, seed: int = 1337) -> LanguageModel:
    """-> a new model with weights drawn from `seed`; torch's global generator is left as it was."""
    config = config if config is not None else entry(name).recipes["demo"][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry(name).model(config)


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] | None = None,
) -> LanguageModel:
    """A model's name, a run directory or a checkpoint -> the trained model, in eval mode, with its `vocabulary` and `card`.

    A name finds the weights that come with this package, else the newest run under runs/. Of a run, the best checkpoint by
    validation loss is taken; `say` hears of checkpoints that had to be skipped, or a warning tells of them.
    Raises CheckpointError with the reason, ValueError for a name that is neither.
    """
    path = Path(name)
    if str(name) in shipped():
        model = _load_shipped(str(name))
    elif str(name) in MODELS:
        model = _load_run(newest_run(str(name)), say)
    elif (path / "checkpoints").is_dir():
        model = _load_run(path, say)
    elif path.exists():
        try:
            saved = checkpoint.load(path)
        except CheckpointError as error:
            way_out = (
                "; give its run instead, and the best checkpoint that is whole is taken"
                if path.parent.name == "checkpoints"
                else ""
            )
            raise CheckpointError(f"{error}{way_out}") from None
        model = restore(saved, path)
    else:
        raise InputError(
            f"{str(name)!r} is neither a model ({', '.join(MODELS)}) nor a run or checkpoint on this disk"
        )
    return model.to(device).eval()


def shipped() -> list[str]:
    """-> the names whose weights come with the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def ship(model: LanguageModel, name: str, text, *, folder: Path | None = None, **about) -> dict:
    """Write a trained model's weights, in half precision (buffers as they are), and its card, to where `load(name)` finds them -> the card.

    The card says what `about` says, and what is measured here on the very weights that are written: the likelihood of the
    whole validation part of `text`, and a sample.
    """
    folder = Path(folder or WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    halved = dict(
        model.named_parameters()
    )  # not buffers: what they count may be more than half precision holds
    weights = {
        key: (tensor.half() if key in halved else tensor).contiguous()
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    path = folder / f"{name}.safetensors"
    save_file(weights, path)
    said = evaluate(model, text)
    *_, draft = stream(model, "\n", 300, seed=1, temperature=0.8)
    card = {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": said.nats_per_char,
        "standard_error": said.standard_error,
        "exact": said.exact,
        "config": dataclasses.asdict(model.config),
        "characters_in_order": model.vocabulary.characters,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sample": {
            "seed": 1,
            "temperature": 0.8,
            "text": model.vocabulary.decode(draft.ids[0, 1:]),
        },
    }
    card = about | card
    card["card_sha256"] = _seal(card)
    (folder / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def _seal(card: dict) -> str:
    """-> the SHA-256 of a card without its own: what the weights are read by must not change unnoticed either."""
    return hashlib.sha256(
        json.dumps({k: v for k, v in card.items() if k != "card_sha256"}, sort_keys=True).encode()
    ).hexdigest()


def newest_run(name: str, runs: str | Path = "runs") -> Path:
    """-> the run of this model under `runs` that saved last. Raises CheckpointError that says how to train one."""
    kind = entry(name).model.__name__
    found = []
    for folder in Path(runs).glob("*"):
        for saved in checkpoint.listed(folder):
            try:
                if json.loads((saved / "config.json").read_bytes())["model"] == kind:
                    found.append((saved.stat().st_mtime, folder))
                break  # the newest that can be read speaks for the run
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
    if not found:
        raise CheckpointError(
            f"there are no trained weights for {name} yet; train some with: irann train {name} --recipe demo"
        )
    return max(found)[1]


def restore(saved: Snapshot, path: Path) -> LanguageModel:
    """A snapshot -> its model, with averaged weights where it has them. Raises CheckpointError if it cannot be built."""
    kinds = {e.model.__name__: e for e in MODELS.values()}
    kind = saved.config.get("model")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"{path} holds a {kind!r}; this irann knows {', '.join(kinds)}")
    weights = dict(saved.model)
    weights |= {
        name.removeprefix("average."): w
        for name, w in saved.optimizer.items()
        if name.startswith("average.")
    }
    card = {
        k: saved.config.get(k)
        for k in (
            "model",
            "config",
            "recipe",
            "step",
            "characters",
            "seconds",
            "validation",
            "exact",
        )
    }
    return _assemble(kinds[kind], saved.config.get("config"), weights, saved.vocabulary, card, path)


def _assemble(entry: Entry, config, weights, characters: str, card: dict, path) -> LanguageModel:
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        model = entry.model(entry.config(**fields))
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not fit this irann's {entry.model.__name__}: {' '.join(str(error).split())}"
        ) from None
    if len(characters) != model.config.vocabulary:
        raise CheckpointError(
            f"{path} has {len(characters)} characters in its vocabulary, its model was made for {model.config.vocabulary}"
        )
    model.vocabulary, model.card = Vocabulary(characters), card
    return model


def _load_run(run: Path, say) -> LanguageModel:
    folder, saved, skipped = checkpoint.best(run)
    for reason in skipped:
        (say or warnings.warn)(f"skipped: {reason}")
    return restore(saved, folder)


def _load_shipped(name: str) -> LanguageModel:
    path, card_path = WEIGHTS / f"{name}.safetensors", WEIGHTS / f"{name}.json"
    try:
        card = json.loads(card_path.read_bytes())
        if card["card_sha256"] != _seal(card):
            raise CheckpointError(
                f"{card_path} is damaged: its content does not fit its own SHA-256"
            )
        checkpoint.check_file(path, card["sha256"])
        weights = {key: tensor.float() for key, tensor in load_file(path).items()}
        kind = {e.model.__name__: e for e in MODELS.values()}[card["model"]]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        CheckpointError,
    ) as error:
        raise CheckpointError(
            f"the weights of {name} that came with this package cannot be used ({error}); install irann again"
        ) from None
    return _assemble(kind, card["config"], weights, card["characters_in_order"], card, path)
