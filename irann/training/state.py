"""All that training goes on from, in memory and, by name, in a checkpoint."""

import copy
import dataclasses
import hashlib
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import checkpoint
from ..checkpoint import Snapshot
from ..lm import LanguageModel, exclusive
from ..settings import InputError
from ..text import Text, printable
from .evaluation import check_mode
from .processes import gathered, rank_and_world
from .recipe import Recipe, optimizers

REMEMBERED = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum",)}  # per parameter
LAST_TRAINED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> mark
GLOBAL_GENERATOR = threading.RLock()  # one thread at a time swaps or seeds torch's


class NotFinite(Exception):
    """Infinite or NaN loss, gradient or weights; training stopped before using or saving them."""

    def __init__(self, what: str):
        way_out = "try a lower lr (of Muon's matrices: muon_lr), a longer warmup or a smaller clip"
        super().__init__(f"{what}; a checkpoint, if there is one, is from before; {way_out}")


class State:
    """One training: model, optimizers, random streams, averaged weights, and how far it is."""

    def __init__(
        self, model: LanguageModel, text: Text, recipe: Recipe, targets: Tensor | None = None
    ):
        self.model = model
        self.text = text
        self.targets = None if targets is None else targets.detach()  # they are no part of it
        self.sha256 = {"ids": sha256_of(text.train, text.val)}
        if targets is not None:
            self.sha256["targets"] = sha256_of(targets)
        self.recipe = recipe
        self.rank, self.world = rank_and_world()
        self.device = model.device
        self.optimizers = optimizers(model, recipe)
        # windows, and the loss's draws for a batch, are the same in all processes; dropout is not
        self.order = torch.Generator("cpu").manual_seed(recipe.seed)
        self.draws = torch.Generator(self.device).manual_seed(recipe.seed + 2**31)
        self.dropout = PrivateStream(recipe.seed + 1 + self.rank, self.device)
        self.average = copy.deepcopy(model).requires_grad_(False) if recipe.ema_decay else None
        self.step = 0
        self.seconds = 0.0
        self.validation: float | None = None
        self.midstep = False
        self.mark: object = None  # of this training, from its first step on

    @property
    def characters(self) -> int:
        return self.step * self.recipe.batch * self.model.config.window

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """One step: nobody else uses the model, and dropout draws from this training's stream."""
        self.midstep = True
        rows = self.recipe.batch // (self.world * self.recipe.accumulate)
        characters = rows * self.model.config.window
        with exclusive(self.model, characters), self.dropout.drawing(), torch.enable_grad():
            self._begin()
            yield
        # not in a `finally`: after an error the weights may be half updated, and Run must not save
        self.midstep = False

    def _begin(self) -> None:
        """Raises InputError if another training changed the model since this one's last step, and
        where autograd is off for good.
        """
        check_mode(self.model)
        if self.mark is None:
            self.mark = LAST_TRAINED[self.model] = object()
        if not self.undisturbed():
            raise InputError(
                "another training of this model has begun since, and has changed its weights: "
                "train a copy of the model (copy.deepcopy), or one after the other"
            )

    def undisturbed(self) -> bool:
        """-> whether the model's weights are still those of this training."""
        return self.mark is None or LAST_TRAINED.get(self.model) is self.mark

    @torch.no_grad()
    def update_average(self) -> None:
        """Move averaged weights towards the model's; a short memory at first forgets the start."""
        if self.average is not None:
            decay = min(self.recipe.ema_decay, self.step / (self.step + 10))
            update = get_ema_multi_avg_fn(decay)  # one launch on a GPU for all parameters
            update(list(self.average.parameters()), list(self.model.parameters()), self.step)

    @torch.no_grad()
    def averaged(self) -> LanguageModel:
        """-> the model to measure and keep: with averaged weights, if the recipe has them."""
        if self.average is None:
            return self.model
        for mean, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            mean.copy_(buffer)
        return self.average

    @torch.no_grad()
    def use_average(self) -> None:
        """At the end the model gets the averaged weights: those `zoo.load` finds in the run."""
        if self.average is not None:
            with exclusive(self.model):
                for mean, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    p.copy_(mean)

    def check_finite(self, update: str) -> None:
        """Raises NotFinite before weights are measured or saved: finite gradient, huge rate."""
        if not self.finite():
            raise NotFinite(
                f"after step {self.step} the weights are not finite, {update}: not saved"
            )

    def finite(self) -> bool:
        kept = list(self.model.state_dict().values())
        if self.average is not None:
            kept += self.average.parameters()
        return all(bool(tensor.isfinite().all()) for tensor in kept)

    # ------------------------------------------------------------------------------ in a checkpoint

    def describe(self) -> dict[str, Any]:
        """-> which training this is, and where it stands: what a checkpoint's config.json says."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        return {
            "model": type(self.model).__name__,
            "config": dataclasses.asdict(self.model.config),
            "recipe": dataclasses.asdict(self.recipe),
            "frozen": frozen,
            "targets": self.sha256.get("targets"),
            "step": self.step,
            "characters": self.characters,
            "seconds": self.seconds,
            "validation": self.validation,
            "exact": self.model.exact,
            "corpus": self.corpus(),
            "environment": checkpoint.environment()
            | {
                "device": self.device.type,
                "gpu": gpu,
                "compile": self.recipe.compile,
                "processes": self.world,
                "weights": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            },
        }

    def corpus(self) -> dict[str, Any]:
        """What a card says of the text."""
        return {
            "source": printable(self.text.source),
            "sha256": self.text.sha256 or self.sha256["ids"],
            "ids": self.sha256["ids"],  # a text may have been cut after it was read
            "training_characters": len(self.text.train),
        }

    def snapshot(self) -> Snapshot:
        """-> everything, by name. Every process of a group calls it."""
        memory: dict[str, Tensor] = {}
        if self.average is not None:
            memory |= {f"average.{name}": p for name, p in self.average.named_parameters()}
        for name, (optimizer, p, key) in self._memory().items():
            if p in optimizer.state:  # a parameter that never had a gradient has none
                memory[name] = torch.as_tensor(optimizer.state[p][key], device=p.device)
        rng = {"order": self.order.get_state(), "draws": self.draws.get_state()}
        for rank, states in enumerate(gathered(self.dropout.states)):
            rng |= {f"{name}.{rank}": state for name, state in states.items()}
        characters = self.text.vocabulary.characters
        return Snapshot(self.model.state_dict(), memory, rng, self.describe(), characters)

    def restore(self, saved: Snapshot) -> None:
        """Take over a snapshot. Raises ValueError, KeyError or RuntimeError where a name or a shape
        does not fit.
        """
        memory = self._checked(saved.optimizer)
        self.mark = LAST_TRAINED[self.model] = object()
        self.model.load_state_dict(saved.model)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        places = self._memory()
        for name, tensor in memory.items():
            optimizer, p, key = places[name]
            dtype = torch.float32 if key == "step" else p.dtype
            optimizer.state[p][key] = tensor.to(p.device, dtype)
        if self.average is not None:
            for name, p in self.average.named_parameters():
                p.copy_(saved.optimizer[f"average.{name}"])
        self.order.set_state(saved.rng["order"])
        if len(saved.rng["draws"]) == len(self.draws.get_state()):  # else another device's
            self.draws.set_state(saved.rng["draws"])
        for name in self.dropout.states:
            state = saved.rng.get(f"{name}.{self.rank}")
            if state is not None:  # or of fewer processes, or of another device
                self.dropout.states[name] = state
        self.step = int(saved.config["step"])
        self.seconds = float(saved.config["seconds"])
        validation = saved.config["validation"]
        self.validation = None if validation is None else float(validation)

    def _memory(self) -> dict[str, tuple[torch.optim.Optimizer, torch.nn.Parameter, str]]:
        """-> optimizers' memory, as "adamw.wte.weight.exp_avg": optimizer, parameter, state key."""
        names = {p: name for name, p in self.model.named_parameters()}
        return {
            f"{type(optimizer).__name__.lower()}.{names[p]}.{key}": (optimizer, p, key)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            for key in REMEMBERED[type(optimizer).__name__]
        }

    def memory_to_come(self) -> int:
        """-> bytes that the optimizers are to remember and, before their first step, do not yet."""
        return sum(
            4 if key == "step" else p.nbytes
            for optimizer, p, key in self._memory().values()
            if p not in optimizer.state
        )

    def _checked(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """-> optimizers' memory, every name and shape checked: their kernels check nothing."""
        memory = {name: t for name, t in memory.items() if not name.startswith("average.")}
        places = self._memory()
        known = {places[name][1] for name in memory if name in places}
        wanted = {name for name, (_, p, _) in places.items() if p in known}
        if memory.keys() != wanted:
            names = ", ".join(sorted(memory.keys() ^ wanted))
            raise ValueError(f"optimizer.safetensors and what is trained here differ in {names}")
        for name, tensor in memory.items():
            _, p, key = places[name]
            shape = () if key == "step" else tuple(p.shape)
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                theirs = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"optimizer.safetensors has {name} as {theirs}, not {shape}")
        return memory


class PrivateStream:
    """A random stream for dropout: inside the block it takes the place of torch's global one.

    What the caller draws between two steps, a sample or a plot, therefore cannot change what
    training draws.
    """

    def __init__(self, seed: int, device: torch.device):
        self.gpus = [device] if device.type == "cuda" else []
        devices = [torch.device("cpu"), *self.gpus]
        self.states = {d.type: torch.Generator(d).manual_seed(seed).get_state() for d in devices}

    @contextmanager
    def drawing(self) -> Iterator[None]:
        with GLOBAL_GENERATOR, torch.random.fork_rng(self.gpus):
            torch.set_rng_state(self.states["cpu"])
            for gpu in self.gpus:
                torch.cuda.set_rng_state(self.states["cuda"], gpu)
            try:
                yield
            finally:
                self.states["cpu"] = torch.get_rng_state()
                for gpu in self.gpus:
                    self.states["cuda"] = torch.cuda.get_rng_state(gpu)


def sha256_of(*parts: Tensor) -> str:
    """-> how a text's ids, or targets, are known again."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
