"""The models of this book: the one list of names, classes, sizes, recipes, and where weights are.

A new model is one more entry here; trainer, chat, benchmark and command line then have it. (Help
texts, colours and races name models too; a new one works without them.)
"""

import dataclasses
import difflib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import checkpoint
from .checkpoint import CheckpointError, Snapshot
from .lm import SEED, LanguageModel, exclusive, stream, vocabulary_of
from .models.diffusion import Diffusion, DiffusionConfig
from .models.gpt import GPT, GPTConfig
from .models.mamba import Mamba, MambaConfig
from .models.thinker import Thinker, ThinkerConfig
from .models.thinker_page import PageThinker
from .settings import Checked, InputError
from .text import Text, Vocabulary
from .training import Recipe, evaluate
from .training.state import GLOBAL_GENERATOR

WEIGHTS = Path(__file__).parent / "weights"

# What all models' recipes begin with. Muon's step is 0.02 where nothing else is said.
BASE = {
    "tiny": dict(optimizer="muon", window=32, steps=100, evaluate_every=50),
    "demo": dict(optimizer="muon", window=128, lr=4e-3, batch=12),
    "full": dict(optimizer="muon", window=256, lr=4e-3, batch=8, save_every=250),
    "gpu": dict(optimizer="muon", window=256, lr=4e-3, batch=32, ema_decay=0.998),
}


# what a model's card takes over from its run's config.json
ON_A_CARD = "model config recipe step characters seconds validation exact corpus".split()


@dataclass(frozen=True)
class Entry:
    """A model: its class, its config, and by recipe's name a pair of config and recipe.

    Every model has `tiny` (seconds, for tests and for trying things), `demo` (about a minute),
    `full` (60 to 85 minutes of two cores of a CPU without AVX-512) and `gpu` (minutes of a GPU).
    The weights that ship were made by `gpu`; the thinker's on a CPU, by `full` with the steps and
    the precision of `gpu`, and then its halting head by book/halting.py.
    """

    model: type[LanguageModel]
    config: type
    recipes: dict[str, tuple[Any, Recipe]]


def _entry(model: type[LanguageModel], config: Checked, **recipes: dict[str, Any]) -> Entry:
    """A model, the options that all its recipes share, and what each recipe changes."""
    pairs = {which: _changed(config, Recipe(), BASE[which] | own) for which, own in recipes.items()}
    return Entry(model, type(config), pairs)


def _changed(config: Any, recipe: Recipe, changes: dict[str, Any]) -> tuple[Any, Recipe]:
    """-> both with fields of either replaced. Raises InputError for an invalid name or value."""
    known = config.settings() | recipe.settings()
    if unknown := [name for name in changes if name not in known]:
        listed = ", ".join(sorted(known))
        raise InputError(f"{unknown[0]} is nothing that can be set; there are {listed}")
    values = {name: known[name].read(name, value) for name, value in changes.items()}

    def replaced(part: Any) -> Any:
        own = {name: value for name, value in values.items() if name in part.settings()}
        return dataclasses.replace(part, **own)  # all at once: halfway it may not fit together

    return replaced(config), replaced(recipe)


# the thinker's form that appendix 2b arrives at: all blocks in the core, and a prior by which a
# further round should gain 0.07 nats (prior_weight times ln 2) to be as likely as the one before it
DEEP: dict[str, Any] = dict(
    prelude=0, core=2, round_gains=True, supervision="late", prior=0.5, prior_weight=0.1
)
# and its halting head since then: a round costs as much (prior_weight times ln 4), and the KL term
# weighs half
HALTING: dict[str, Any] = dict(halt_width=128, prior=0.75, prior_weight=0.05)
WIDE = dict(heads=3, width=264)
DEEP_AND_WIDE = DEEP | HALTING | WIDE | dict(rounds=6, dropout=0.1, muon_lr=0.012, ema_decay=0.998)

MODELS: dict[str, Entry] = {
    "gpt": _entry(
        GPT,
        GPTConfig.fast(layers=4, heads=3, width=192),
        tiny=dict(layers=2, heads=2, width=32),
        demo=dict(heads=2, width=128, steps=400),
        full=dict(dropout=0.15, steps=10_000, evaluate_every=1000),
        gpu=dict(dropout=0.15, steps=5000, evaluate_every=500),
    ),
    "thinker": _entry(
        Thinker,
        ThinkerConfig(),
        tiny=dict(width=32, rounds=3),
        demo=DEEP | HALTING | dict(width=128, rounds=3, steps=250),
        full=DEEP_AND_WIDE | dict(steps=2500, evaluate_every=500),
        # with batch 32, dropout 0.15: 1.420 at best, after 16 million characters; then it overfits
        gpu=DEEP_AND_WIDE | dict(batch=8, steps=5500, evaluate_every=1100, precision="bfloat16"),
    ),
    "thinker-page": _entry(
        PageThinker,
        ThinkerConfig(rounds=4),
        tiny=dict(width=32, rounds=3),
        demo=dict(width=128, steps=250),
        full=WIDE | dict(steps=4500, evaluate_every=900),
        gpu=WIDE | dict(dropout=0.1, batch=64, steps=5000, evaluate_every=1000),
    ),
    "diffusion": _entry(
        Diffusion,
        DiffusionConfig(layers=4, heads=3, width=192),
        tiny=dict(page=16, layers=2, heads=2, width=32, channels=8, levels=200),
        demo=dict(heads=2, width=128, batch=16, steps=300, ema_decay=0.99),
        full=dict(steps=9000, ema_decay=0.999, evaluate_every=3000),
        gpu=dict(batch=64, steps=6000, ema_decay=0.999, evaluate_every=1500),
    ),
    "mamba": _entry(
        Mamba,
        MambaConfig.fast(layers=7, width=192),
        tiny=dict(layers=2, width=32, d_state=4),
        demo=dict(layers=3, width=96, steps=400),
        # with batch 8, dropout 0.15, no average: 1.466 from as many characters, in 73 minutes
        full=dict(
            dropout=0.2, batch=32, steps=1750, ema_decay=0.998, evaluate_every=250, save_every=50
        ),
        gpu=dict(dropout=0.2, steps=5000, evaluate_every=500),
    ),
}


def entry(name: str) -> Entry:
    """-> the entry of a model. Raises InputError that lists the names there are."""
    if not isinstance(name, str) or name not in MODELS:
        meant = difflib.get_close_matches(str(name), MODELS, 1)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        raise InputError(f"there is no model {name!r}; the models are {', '.join(MODELS)}{hint}")
    return MODELS[name]


def recipe(name: str, which: str = "demo", /, **changes: Any) -> tuple[Any, Recipe]:
    """-> config and recipe of a model, with fields of either replaced. Raises InputError for a name
    or value that is none.

    Values may be strings, as from a command line; they are read as the type of what they replace.
    """
    recipes = entry(name).recipes
    if which not in recipes:
        raise InputError(f"there is no recipe {which!r} for {name}; there are {', '.join(recipes)}")
    return _changed(*recipes[which], changes)


def build(name: str, config: Any = None, *, seed: int = 1337, **sizes: Any) -> LanguageModel:
    """-> a new model with weights drawn from `seed`; torch's global generator is left as it was.

    Without a `config` it has the size of the recipe demo; `sizes` change fields of either. Raises
    InputError for a name or a value that is none.
    """
    config = config if config is not None else entry(name).recipes["demo"][0]
    if not isinstance(config, entry(name).config):
        raise InputError(
            f"the config of {name} is a {entry(name).config.__name__}, the first of what "
            f"irann.recipe({name!r}) gives; got a {type(config).__name__}"
        )
    if unknown := [size for size in sizes if size not in config.settings()]:
        listed = ", ".join(config.settings())
        raise InputError(f"{unknown[0]} is no size of {name}; there are {listed}")
    config = dataclasses.replace(config, **sizes)
    seed = SEED.check("seed", seed)
    on_cpu = torch.get_default_device().type == "cpu"
    gpus = [] if on_cpu else range(torch.cuda.device_count())
    with GLOBAL_GENERATOR, torch.random.fork_rng(gpus):
        drawn_from = torch.default_generator if on_cpu else torch  # which seeds all devices
        drawn_from.manual_seed(seed)
        return entry(name).model(config)


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] | None = None,
) -> LanguageModel:
    """A model's name, a run directory or a checkpoint -> the trained model, in eval mode, with its
    `vocabulary` and `card`.

    A name finds the weights that come with this package, else the newest run under runs/; a Path is
    never a name, nor is "./gpt". Of a run, the best checkpoint by validation loss is taken; `say`
    hears of checkpoints that had to be skipped, or a warning tells of them. Raises CheckpointError
    with the reason, InputError for a name that is neither.
    """
    path = checkpoint.found(Path(name))
    if isinstance(name, str) and name in shipped():
        model = _load_shipped(name)
    elif isinstance(name, str) and name in MODELS:
        run = newest_run(name)
        if run is None:
            raise CheckpointError(
                f"there are no trained weights for {name} yet; train some with: irann train "
                f"{name} --recipe demo"
            )
        model = _load_run(run, say)
    elif (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file():
        model = _load_run(path, say)
    elif path.is_file() or path.parent.name == "checkpoints" or checkpoint.holds_any(path):
        try:
            saved = checkpoint.load(path)
        except CheckpointError as error:
            if path.parent.name != "checkpoints":
                raise
            way_out = "give its run instead, and the best checkpoint that is whole is taken"
            raise CheckpointError(f"{error}; {way_out}") from None
        model = restore(saved, path)
    else:
        meant = difflib.get_close_matches(str(name), [*names(), *map(str, runs())], 1)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        raise InputError(
            f"{str(name)!r} is neither a model ({', '.join(names())}) nor a run or checkpoint "
            f"on this disk{hint}"
        )
    return model.to(device).eval()


def shipped() -> list[str]:
    """-> the names whose weights come with the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def names() -> list[str]:
    """-> the models, and other weights that ship: all that `load` may know by a name."""
    return [*MODELS, *(name for name in shipped() if name not in MODELS)]


def ship(model: LanguageModel, name: str, text: Text, **about: Any) -> dict:
    """Write a trained model's weights and its card to where `load(name)` finds them -> the card.

    Parameters are written in half precision, buffers as they are: what they count may be more than
    half precision holds. The card says what `about` says, and what is measured here on the very
    weights that are written: the likelihood of the whole validation part of `text`, and a sample.
    `model` is left with these rounded weights.
    """
    halved = dict(model.named_parameters())
    weights = {
        key: (tensor.half() if key in halved else tensor).contiguous()
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    path = WEIGHTS / f"{name}.safetensors"
    save_file(weights, path)
    measured = evaluate(model, text)
    vocabulary = vocabulary_of(model)
    *_, draft = stream(model, "\n", 300, seed=1, temperature=0.8)
    sample = vocabulary.decode(draft.ids[0, 1:])
    card = about | {
        "model": type(model).__name__,
        "parameters": model.num_parameters,
        "validation": measured.nats_per_char,
        "standard_error": measured.standard_error,
        "exact": measured.exact,
        "config": dataclasses.asdict(model.config),
        "characters_in_order": vocabulary.characters,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sample": {"seed": 1, "temperature": 0.8, "text": sample},
    }
    card["card_sha256"] = _seal(card)
    (WEIGHTS / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def _seal(card: dict) -> str:
    """-> a card's SHA-256, its own left out: what weights are read by must not change unnoticed."""
    content = {key: value for key, value in card.items() if key != "card_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def runs() -> dict[Path, tuple[float, dict]]:
    """-> what is under runs/, last saved first: when, and what its newest checkpoint says."""
    found = {}
    for run in Path("runs").glob("*"):
        with suppress(OSError):  # it may not be read, or a trainer is removing what was listed
            for saved in checkpoint.listed(run):
                if config := checkpoint.config_of(saved):
                    found[run] = (saved.stat().st_mtime, config)
                    break
    return dict(sorted(found.items(), key=lambda item: item[1][0], reverse=True))


def newest_run(name: str) -> Path | None:
    """-> the last saved run of this model under runs/, if there is one."""
    kind = entry(name).model.__name__
    return next((run for run, (_, config) in runs().items() if config.get("model") == kind), None)


def namesake(name: str) -> str:
    """-> if a name could be shipped weights or a run: which it is, how to have the other; or ''."""
    run = newest_run(name) if name in MODELS else None
    if run is None:
        return ""
    if name in shipped():
        return f"{name} is the model that ships; the one that you trained last is {run}"
    return f"{name} is the one that you trained last, {run}"


def save(model: LanguageModel, folder: str | Path) -> Path:
    """Write a model and its vocabulary to a folder, from which `load` makes it again -> the folder.

    An older model there is replaced. Raises InputError for a link or a folder that holds anything
    else, for a name by which `load` finds another model, and for a model without a vocabulary, with
    one of another size, of a class that `load` does not know, or as `check_weights` does;
    DiskError.
    """
    characters = vocabulary_of(model).characters
    if type(model) not in (known.model for known in MODELS.values()):
        raise InputError(
            f"a {type(model).__name__} is none of {', '.join(MODELS)}, and could not be loaded "
            "again: keep its state_dict()"
        )
    check_weights(model)
    if isinstance(folder, str) and folder in names():
        raise InputError(f"{folder} is a model of the book: give another name, such as my-{folder}")
    folder = Path(folder)
    if not checkpoint.replaceable(folder):
        raise InputError(
            f"{folder} is a link, or holds something else: give the name of a new folder"
        )
    card = (model.card or {}) | {
        "model": type(model).__name__,
        "config": dataclasses.asdict(model.config),
    }
    with exclusive(model):  # in another thread it may be in training
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return checkpoint.save(folder, Snapshot(weights, {}, {}, card, characters))


def check_weights(model: LanguageModel) -> None:
    """Raises InputError for a model that has other weights than one that its config makes."""
    states = (_made(type(model), model.config).state_dict(), model.state_dict())
    plain, own = ({name: weight.shape for name, weight in state.items()} for state in states)
    if other := sorted(dict(plain.items() ^ own.items())):
        raise InputError(
            f"a {type(model).__name__} of this config has other weights, see {other[0]}: undo what "
            "was added to it (as prune.remove does), or build a model of this size"
        )


def _made(kind: type[LanguageModel], config: Any) -> LanguageModel:
    """-> a model on the CPU; its weights, which are drawn, cost torch's generator nothing."""
    with GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return kind(config)


def restore(saved: Snapshot, path: Path) -> LanguageModel:
    """A snapshot -> its model, with any averaged weights. Raises CheckpointError if that fails."""
    averaged = {
        name.removeprefix("average."): weight
        for name, weight in saved.optimizer.items()
        if name.startswith("average.")
    }
    card = {key: saved.config.get(key) for key in ON_A_CARD}
    return _assemble(card, saved.model | averaged, saved.vocabulary, path)


def _assemble(
    card: dict, weights: dict[str, torch.Tensor], characters: str, path: Path
) -> LanguageModel:
    kinds = {e.model.__name__: e for e in MODELS.values()}
    kind = card["model"]
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"{path} holds a {kind!r}; this irann knows {', '.join(kinds)}")
    try:
        model = _made(kinds[kind].model, kinds[kind].config(**card["config"]))
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in weights:
                tensor.data = tensor.data.to(weights[name].dtype)
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit this irann's {kind}: {reason}") from None
    if len(characters) != model.config.vocabulary:
        raise CheckpointError(
            f"{path} has {len(characters)} characters in its vocabulary, its model was made "
            f"for {model.config.vocabulary}"
        )
    model.vocabulary = Vocabulary(characters)
    model.card = card
    return model


def _load_run(run: Path, say: Callable[[str], None] | None) -> LanguageModel:
    folder, saved, skipped = checkpoint.best(run)
    for reason in skipped:
        (say or warnings.warn)(f"skipped: {reason}")
    return restore(saved, folder)


def card(name: str) -> dict:
    """-> the card of weights that ship. Raises CheckpointError if it is damaged, InputError for a
    name under which none ship.
    """
    if name not in shipped():
        raise InputError(f"no weights ship as {name!r}; there are {', '.join(shipped())}")
    path = WEIGHTS / f"{name}.json"
    with _shipped_whole(name):
        content = json.loads(path.read_bytes())
        if content["card_sha256"] != _seal(content):
            raise CheckpointError(f"{path} is damaged: its content does not fit its SHA-256")
        return content


def _load_shipped(name: str) -> LanguageModel:
    about = card(name)
    path = WEIGHTS / f"{name}.safetensors"
    with _shipped_whole(name):
        checkpoint.check_file(path, about["sha256"])
        weights = {key: tensor.float() for key, tensor in load_file(path).items()}
        return _assemble(about, weights, about["characters_in_order"], path)


@contextmanager
def _shipped_whole(name: str) -> Iterator[None]:
    """What goes wrong inside the block is a fault of the package's files, in one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError, CheckpointError) as error:
        raise CheckpointError(
            f"the weights of {name} that came with this package cannot be used ({error}); "
            "install irann again"
        ) from None
