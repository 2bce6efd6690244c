"""The command line: irann book | chat | train | sample | eval | list | plot | export | data | bench
| doctor.

Exit codes: 0 done, 1 disk or memory too small, 2 bad input, 3 bad checkpoint, 4 data not what it
should be, 5 loss not finite, 6 run directory in use, 130 and 143 after SIGINT and SIGTERM with a
checkpoint saved, 141 when nobody reads what training tells. Whatever else goes wrong is a fault of
the program, and keeps its traceback.
"""

import contextlib
import dataclasses
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from . import book as pages
from . import checkpoint, lm, runs, shakespeare, zoo
from .chat import streams
from .checkpoint import CheckpointError, DiskError, why
from .machine import lacks_memory
from .sampling import SAMPLING
from .settings import InputError, Setting
from .text import CorpusError, Text, printable, read_text, slug
from .training import InUse, NotFinite, Signals, Tick, evaluate, progress, train
from .training.state import sha256_of

EXIT_CODES: dict[type[Exception], int] = {
    CheckpointError: 3,
    CorpusError: 4,
    NotFinite: 5,
    InUse: 6,
    InputError: 2,
    DiskError: 1,
}
SEEDS = Setting(3, "how often a race is run; default 3", low=1)
WRITERS = ("train", "bench")  # they leave files: what they print may go nowhere
*MOST, LAST = zoo.MODELS
NAMES = f"{', '.join(MOST)} or {LAST}"
ABOUT = f"""Small language models and the book that derives them: read it, talk with the models,
train one on a text of your own.

MODEL is {NAMES}. Begin with: irann book, or irann chat gpt"""
EXTRA: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True}

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=ABOUT,
)


def _option(help: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar)


def _folder(name: str) -> Path:
    if not name:
        raise typer.BadParameter("it is empty: name a directory, or leave it out")
    return Path(name)


def _number(setting: Setting) -> Any:
    """An option whose text `setting` reads."""
    return typer.Option(metavar="NUMBER", help=setting.help)


def _names(incomplete: str) -> list[str]:
    """What completes a model's name in a shell."""
    return [name for name in zoo.MODELS if name.startswith(incomplete)]


def _speakers(incomplete: str) -> list[str]:
    """What completes the name of a model that has been trained."""
    known = [*zoo.names(), *map(str, zoo.runs())]
    return [name for name in known if name.startswith(incomplete)]


Model = Annotated[str, typer.Argument(metavar="MODEL", help=NAMES, autocompletion=_names)]
Trained = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a model's name, or a run directory, or a checkpoint",
        autocompletion=_speakers,
    ),
]
SHAKESPEARE = "tiny-shakespeare"
CorpusOption = _option("another UTF-8 text instead of tiny-shakespeare", metavar="FILE")
MeasuredTextOption = _option(
    "the text to measure on; default: the one it was trained on", metavar="FILE"
)
Device = Annotated[str, _option("cpu, cuda, mps, or auto: a GPU where there is one")]
RecipeOption = _option("demo: about a minute; full: up to 90 minutes of two CPU cores")
ChangesOption = _option(
    "change the recipe or the size, e.g. lr=1e-3", "--set", metavar="NAME=VALUE"
)
RunOption = typer.Option(
    help="where checkpoints and metrics go; default runs/MODEL-RECIPE[-TEXT]",
    metavar="DIR",
    parser=_folder,
)
ResumeOption = _option("go on from the newest checkpoint of the run", "--resume")
OverwriteOption = _option("throw the run in this directory away and start anew", "--overwrite")
LogOption = _option('also log to wandb or tensorboard (pip install "irann[log]")', metavar="TOOL")
PromptOption = _option("what the text begins with; - reads it from standard input")
EncodedOption = _option(
    "also write train_encoded.npy, val_encoded.npy, vocab.json here", metavar="DIR"
)
ShakespeareOption = _option("where tiny-shakespeare already lies", metavar="FILE")
TextArgument = typer.Argument(
    metavar="[FILE]", help="a text of your own to look at", show_default=False
)
TrainingsArgument = typer.Argument(metavar="RUN", help="a run directory, such as runs/gpt-demo")
PictureOption = _option("write a picture instead, such as curve.png", metavar="FILE")
WhatArgument = typer.Argument(
    help="scan: the scan against others; engine: what runs in a page against PyTorch; waiting: "
    "training beside other work; stopping: what the thinker's rule is worth; regressions: what "
    "became slower; all: trained models too; gpt, thinker-page, diffusion, mamba: that one alone; "
    "models, models-long, thinker, thinker-long, nanogpt, speedrun: races, trained side by side"
)
QuickOption = _option("small sizes, to see whether it runs: about three minutes for all", "--quick")
ReportOption = _option("where the report goes; bench-report, or bench-report/quick", metavar="DIR")
PageOption = _option("where the page goes; default MODEL.html", metavar="FILE")
RaceDeviceOption = _option(
    "cpu, cuda, mps or auto: what a race is trained on; all else is on the CPU"
)


def _version(wanted: bool) -> None:
    import irann

    if wanted:
        print(f"irann {irann.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="say it, and end")
    ] = False,
) -> None:
    pass


@app.command("book", context_settings=EXTRA)
def book_command(context: typer.Context) -> None:
    """Open the book in JupyterLab. What follows is for JupyterLab, such as --no-browser."""
    pages.main(*context.args)


@app.command()
def data(
    file: Annotated[Path | None, TextArgument] = None,
    out: Annotated[Path | None, EncodedOption] = None,
    corpus: Annotated[Path | None, ShakespeareOption] = None,
) -> None:
    """Look at a text: yours, or tiny-shakespeare, which is found or rebuilt, and checked."""
    if file is not None and corpus is not None:
        raise InputError("either FILE, a text of your own, or --corpus, tiny-shakespeare's place")
    if file is not None:
        text = read_text(file)
        config, recipe = zoo.recipe("gpt", "demo")
        for line in runs.look(text, config, recipe, "demo"):
            print(streams.visible(line))
        if len(text.train) > config.window:
            print(f"train on it: irann train gpt --corpus {runs.quoted(printable(file))}")
    else:
        text = shakespeare.load(corpus)
        sizes = f"{len(text.train):,} characters to train on, {len(text.val):,} to validate with"
        print(f"tiny-shakespeare, {text.source}")
        print(f"{sizes}, {len(text.vocabulary)} different ones")
        print(f"SHA-256 {text.sha256}")
    if out:
        for path in text.write(out):
            print(f"wrote {path}")


@app.command("train")
def train_command(
    model: Model,
    recipe: Annotated[str, RecipeOption] = "demo",
    changes: Annotated[list[str] | None, ChangesOption] = None,
    run: Annotated[Path | None, RunOption] = None,
    resume: Annotated[bool, ResumeOption] = False,
    overwrite: Annotated[bool, OverwriteOption] = False,
    corpus: Annotated[Path | None, CorpusOption] = None,
    device: Device = "auto",
    log: Annotated[str | None, LogOption] = None,
) -> None:
    """Train a model; Ctrl-C saves a checkpoint, --resume goes on from it."""
    if log not in (None, "wandb", "tensorboard"):
        raise InputError(f"--log is wandb or tensorboard; got {log!r}")
    pairs = dict(_pair(change) for change in changes or ())
    zoo.recipe(model, recipe, **pairs)  # names and values first, before anything is read
    text = _corpus(corpus)
    sizes = {"vocabulary": len(text.vocabulary)} | pairs
    config, plan = zoo.recipe(model, recipe, **sizes)
    own = text.sha256 != shakespeare.SHA256
    if own and "evaluate_every" not in pairs and not 0 < plan.evaluate_every < plan.steps:
        plan = dataclasses.replace(plan, evaluate_every=runs.evaluations(text, config, plan))
    place = f"{model}-{recipe}-{slug(corpus)}" if own and corpus else f"{model}-{recipe}"
    run = run or Path("runs") / place
    with _processes(device) as (rank, own_device):
        network = zoo.build(model, config, seed=plan.seed).to(own_device)
        characters = plan.batch * network.config.window
        if rank == 0:  # one of several processes tells
            if own:
                changed = bool(pairs.keys() - {"seed", "evaluate_every", "save_every"})
                for line in runs.look(text, config, plan, recipe, changed=changed):
                    print(streams.visible(line))
            print(
                f"{model}, {network.num_parameters:,} parameters, recipe {recipe}: "
                f"{plan.steps:,} steps of {characters:,} characters; {run}"
            )
        with Signals() as stop, contextlib.ExitStack() as stack:
            logger = None if rank else _logger(log, run, stack)
            ticks = train(
                network, text, plan, run=run, resume=resume, overwrite=overwrite, stop=stop
            )
            last, losses = _follow(ticks, plan.steps, rank == 0, logger)
            if rank == 0:
                size = len(text.train)
                for line in _ending(model, run, plan.steps, last, losses, network.exact, size):
                    print(line)
            if last is not None and last.interrupted:
                raise typer.Exit(128 + last.interrupted)


def _ending(
    name: str,
    run: Path,
    steps: int,
    last: Tick | None,
    losses: deque[float],
    exact: bool,
    size: int,
) -> Iterator[str]:
    """Yields how the training of a model ended, and the commands that go on with its run."""
    if last is None:
        nats = checkpoint.validation_of(checkpoint.listed(run)[0])
        yield f"nothing left to do: {run} has reached its {steps:,} steps"
        yield f"{_likelihood(nats, exact)} after the last of them"
    elif last.step < steps:
        yield f"stopped at step {last.step:,}, saved in {last.saved}; go on with: {_again()}"
        yield from _who_speaks(run)
        return
    else:
        nats = _likelihood(last.validation, exact)
        yield f"{nats} after {last.seconds:,.0f} s; saved in {last.saved}"
        passes = last.characters / size
        if learned := runs.by_heart(sum(losses) / len(losses), last.validation or 0.0, passes):
            yield learned
    yield "go on with:"
    yield from runs.nexts(run)
    yield from _who_speaks(run)
    if name in zoo.shipped():
        yield f"(irann chat {name} talks with the model that ships, as the notebooks do)"


def _likelihood(validation: float | None, exact: bool) -> str:
    nats = "nats" if exact else "nats, a bound,"
    return f"{validation or 0.0:.4f} {nats} per character of the validation part"


def _who_speaks(run: Path) -> Iterator[str]:
    """Yields which checkpoint `load` takes, where it is not the newest."""
    saved = checkpoint.listed(run)
    best = checkpoint.by_validation(saved)
    if best and best[0] != saved[0]:
        lowest = checkpoint.validation_of(best[0])
        yield f"what speaks is {best[0].name}, whose validation was the lowest, {lowest:.4f}"


def _follow(
    ticks: Iterator[Tick], steps: int, shown: bool, logger: Callable[[Tick], None] | None
) -> tuple[Tick | None, deque[float]]:
    """Train, on the screen if `shown` -> the last tick and losses; a failure saves a checkpoint."""
    last = None
    losses: deque[float] = deque(maxlen=20)
    with contextlib.closing(ticks):  # pyright: ignore[reportArgumentType]
        for last in progress(ticks, steps, mininterval=0.5) if shown else ticks:
            named = (v for name, v in last.parts.items() if name.endswith("nats_per_char"))
            losses.append(next(named, last.loss))
            if shown and last.notes and sys.stdout is not None:
                tqdm.write("\n".join(last.notes))  # above the bar
            if logger:
                logger(last)
    return last, losses


@app.command(context_settings=EXTRA)
def sample(
    context: typer.Context,
    model: Trained,
    prompt: Annotated[str, PromptOption] = "",
    length: Annotated[str, _number(lm.LENGTH)] = "500",
    temperature: Annotated[str, _number(SAMPLING["temperature"])] = "1.0",
    top_k: Annotated[str, _number(SAMPLING["top_k"])] = "0",
    top_p: Annotated[str, _number(SAMPLING["top_p"])] = "1.0",
    seed: Annotated[str | None, _number(lm.SEED)] = None,
    device: Device = "auto",
) -> None:
    """Let a trained model write. Models may have their own settings, as --steps or --rounds."""
    _first(model)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = {name: SAMPLING[name].read(name, value) for name, value in given.items()}
    characters = lm.LENGTH.read("length", length)
    number = None if seed is None else lm.SEED.read("seed", seed)
    prompt = streams.heard() if prompt == "-" else prompt
    own = _extra(context.args)
    network = _load(model, device)
    for name, value in own.items():
        known = (SAMPLING | network.settings).get(name)
        settings[name] = known.read(name, value) if known else value
    lm.check_settings(network, settings)
    vocabulary = lm.vocabulary_of(network)
    prompt = vocabulary.spelt(prompt)
    streams.check_encoding(vocabulary.characters)
    shown = 0
    try:
        for draft in lm.stream(network, prompt, characters, seed=number, **settings):
            if draft.forgotten and not shown:
                streams.tell(
                    f"the window holds {network.config.window} characters: "
                    f"the first {draft.forgotten:,} of the prompt are not read"
                )
            print(vocabulary.decode(draft.ids[0, shown : draft.settled]), end="", flush=True)
            shown = max(shown, draft.settled)
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None
    print()


@app.command(context_settings=EXTRA)
def chat(context: typer.Context, model: Trained = "gpt", device: Device = "auto") -> None:
    """Talk with a trained model; /help lists what can be set."""
    from .chat import terminal

    _first(model)
    streams.tell(zoo.namesake(model))
    terminal.main(model, _extra(context.args), device=_device(device))


@app.command("eval")
def eval_command(
    model: Trained,
    corpus: Annotated[Path | None, MeasuredTextOption] = None,
    device: Device = "auto",
) -> None:
    """Measure nats per character over the whole validation part, every character once."""
    network = _load(model, device)
    text, what = _measured(network, model, corpus)
    text = _in_its_characters(network, text)
    print(evaluate(network, text))
    print(
        f"windows of {network.config.window} characters that do not overlap, "
        f"every character once; {text.source}"
    )
    print(what)


@app.command("list")
def list_command() -> None:
    """List the models, what ships, and the runs under runs/."""
    for line in runs.listing():
        print(streams.visible(line))


@app.command()
def plot(
    run: Annotated[Path, TrainingsArgument], out: Annotated[Path | None, PictureOption] = None
) -> None:
    """Show how a run has learned: a curve in characters, or a picture."""
    if out is None:
        for line in runs.plot(run):
            print(line)
        return
    print(f"wrote {runs.picture(run, out)}")


@app.command()
def export(model: Trained, out: Annotated[Path | None, PageOption] = None) -> None:
    """Write one HTML file in which a trained model is live: no Python, no network."""
    from .export import page

    network = zoo.load(model, say=streams.tell)
    written = page(network)
    out = out or Path(f"{Path(model).resolve().name}.html")
    runs.write(out, written.encode())
    print(f"wrote {out}, {len(written) / 1e6:.1f} MB; open it in a browser")


@app.command()
def bench(
    what: Annotated[str, WhatArgument] = "all",
    quick: Annotated[bool, QuickOption] = False,
    out: Annotated[Path | None, ReportOption] = None,
    seeds: Annotated[str | None, _number(SEEDS)] = None,
    device: Annotated[str, RaceDeviceOption] = "cpu",
) -> None:
    """Time the selective scan against others, compare the trained models, or train models side by
    side.

    Goes on where it stopped."""
    from .bench import suite

    out = out or Path("bench-report") / ("quick" if quick else "")
    number = None if seeds is None else SEEDS.read("seeds", seeds)
    suite.main(what, quick=quick, out=out, seeds=number, device=_device(device))


@app.command()
def doctor() -> None:
    """Say what is installed, what is in use and what is wrong: paste it when you report a fault."""
    from .doctor import report

    for line in report():
        print(line)


def _first(model: str) -> None:
    if model.startswith("-"):
        raise InputError(
            "the model comes first, then what is set, as in: irann sample gpt --seed 1; got "
            f"{model!r}"
        )


def _pair(change: str) -> tuple[str, str]:
    name, equals, value = change.partition("=")
    if not equals or not name:
        raise InputError(f"--set takes NAME=VALUE, such as lr=1e-3; got {change!r}")
    return name.strip(), value.strip()


def _extra(arguments: list[str]) -> dict[str, str]:
    """--name value, or --name=value, left over from the command line -> a dict."""
    extra = {}
    remaining = list(arguments)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        if not name.startswith("--") or not (equals or remaining):
            what = "has no value" if name.startswith("--") else "means nothing here"
            raise InputError(f"{name!r} {what}: a model's own settings are given as --name value")
        extra[name[2:].replace("-", "_")] = value if equals else remaining.pop(0)
    return extra


def _corpus(path: Path | None) -> Text:
    """tiny-shakespeare, or any other UTF-8 text with a vocabulary of its own."""
    if path is None or (str(path) == SHAKESPEARE and not path.exists()):
        return shakespeare.load()
    text = read_text(path)
    if text.source != str(path):  # it was not read as it stands there
        streams.tell(text.source)
    return text


def _load(model: str, device: str) -> lm.LanguageModel:
    """-> a trained model; where its name could mean another one too, that is said."""
    network = zoo.load(model, device=_device(device), say=streams.tell)
    streams.tell(zoo.namesake(model))
    return network


def _measured(network: lm.LanguageModel, name: str, given: Path | None) -> tuple[Text, str]:
    """-> the text to measure a model on, the one it was trained on unless another is given, and a
    sentence that says which. Raises CorpusError if it is not known or not what it was.
    """
    corpus = (network.card or {}).get("corpus")
    if corpus is None:  # saved without a training
        unknown = f"what {name} was trained on is not known"
        if given is None:
            raise CorpusError(f"{unknown}; give the text to measure on: --corpus FILE")
        return _corpus(given), unknown
    if not isinstance(corpus, dict):  # what ships
        corpus = {"sha256": shakespeare.SHA256}
    of_shakespeare = corpus["sha256"] == shakespeare.SHA256
    source = SHAKESPEARE if of_shakespeare else corpus.get("source", "a string")
    if given is not None:
        text = _corpus(given)
        if text.sha256 != corpus["sha256"]:
            return text, f"another text than {name} was trained on, which is {source}"
    elif of_shakespeare:
        text = shakespeare.load()
    else:
        path = runs.file_of(source)
        way_out = f"give the text to measure on: --corpus FILE, or --corpus {SHAKESPEARE}"
        if not path.is_file():
            raise CorpusError(f"{name} was trained on {source}, which is not here; {way_out}")
        text = read_text(path)
        if text.sha256 != corpus["sha256"]:
            raise CorpusError(f"{path} is not any more what {name} was trained on; {way_out}")
    text = _in_its_characters(network, text)
    cut = corpus.get("training_characters", len(text.train))
    if cut != len(text.train):  # it was split elsewhere for the training
        whole = torch.cat([text.train, text.val])
        text = dataclasses.replace(text, train=whole[:cut], val=whole[cut:])
    if corpus.get("ids") not in (None, sha256_of(text.train, text.val)):
        otherwise = "cut otherwise then: this may hold some of what it was trained with"
        return text, f"the text {name} was trained on, {otherwise}"
    return (
        text,
        f"the text {name} was trained on: the last part, which it has not been trained with",
    )


def _in_its_characters(network: lm.LanguageModel, text: Text) -> Text:
    """-> the text in the model's vocabulary. Raises InputError where that lacks some of it."""
    vocabulary = lm.vocabulary_of(network)
    if text.vocabulary != vocabulary:
        everything = text.vocabulary.decode(torch.cat([text.train, text.val]))
        if vocabulary.unknown(everything):
            raise InputError(
                f"{text.source} has characters that are not among the {len(vocabulary)} of the "
                f"model, such as {vocabulary.unknown(everything)[:20]!r}: measure it on a text of "
                "its own characters, such as the one it was trained on"
            )
        cut = len(text.train)
        ids = vocabulary.encode(everything)
        text = dataclasses.replace(text, train=ids[:cut], val=ids[cut:], vocabulary=vocabulary)
    return text


def _device(name: str, rank: int = 0) -> torch.device:
    gpu = "mps" if torch.backends.mps.is_available() else "cpu"
    if torch.cuda.is_available():
        gpu = "cuda"
    name = gpu if name == "auto" else name
    if name not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device is cpu, cuda, mps or auto; got {name!r}")
    if name not in ("cpu", gpu):
        raise InputError(f"--device {name}: there is none here; use cpu or auto")
    if name == "cuda":
        return torch.device(name, rank % torch.cuda.device_count())
    return torch.device(name)


@contextlib.contextmanager
def _processes(device: str) -> Iterator[tuple[int, torch.device]]:
    """Under torchrun, join the other processes -> this one's rank, and what it computes on."""
    own = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if "LOCAL_RANK" not in os.environ:
        yield 0, own
        return
    import torch.distributed as dist

    if own.type == "cuda":  # NCCL talks from the current GPU: the first one, unless told so
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.device_count()
        if processes > gpus:
            raise InputError(
                f"{processes} processes want a GPU each, here there are {gpus}: start fewer "
                f"(--nproc-per-node={gpus}), or use --device cpu"
            )
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), own
    finally:
        dist.destroy_process_group()


def _logger(
    tool: str | None, run: Path, stack: contextlib.ExitStack
) -> Callable[[Tick], None] | None:
    """-> what writes ticks to the tool, opened at the first. Raises InputError if it is missing."""
    opened: list[Any] = []
    try:
        if tool == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            def start(step: int) -> Any:  # what a kill left of later steps is not shown
                return stack.enter_context(SummaryWriter(run, purge_step=step))
        elif tool == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            def start(step: int) -> Any:
                return wandb.init(project="irann", name=run.name, dir=run)
        else:
            return None
    except ImportError:
        raise InputError(f'--log {tool} needs {tool}: pip install "irann[log]"') from None

    def log(tick: Tick) -> None:
        row = {"loss": tick.loss, "lr": tick.lr, "chars_per_second": tick.chars_per_second}
        if tick.validation is not None:
            row["validation"] = tick.validation
        row |= tick.parts
        if not opened:
            opened.append(start(tick.step))
        if tool == "wandb":
            opened[0].log(row, step=tick.step)
            return
        for name, value in row.items():
            opened[0].add_scalar(name, value, tick.step)

    return log


def _again() -> str:
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    program = ["irann"]
    if "LOCAL_RANK" in os.environ:
        count = os.environ["LOCAL_WORLD_SIZE"]
        program = ["torchrun", "--standalone", f"--nproc-per-node={count}", "-m", "--", "irann"]
    return runs.quoted(*program, *words, "--resume")


# ---------------------------------------------------------------------------------- what goes wrong


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every expected failure is one sentence on stderr and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        streams.prepare()
        if sys.stdout is None and not set(arguments[:1]) & set(WRITERS):
            raise InputError("standard output is closed: there is nowhere to write to")
        code = app(arguments or ["--help"], standalone_mode=False, prog_name="irann")
        print(end="", flush=True)  # here a full disk or a reader that left is still met below
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = _unheard(arguments)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = _unheard(arguments)  # click has made an exit of it
    except Exception as error:
        expected = _expected(error)
        if expected is None:
            raise
        code, words = expected
        streams.tell(words.rstrip("."))
        try:
            print(end="", flush=True)
        except OSError:  # Python would try again to write our output while it ends
            _drop_output()
    sys.exit(code if isinstance(code, int) else 0)


def _unheard(arguments: list[str]) -> int:
    """The reader of our output left, as `| head` does -> the exit code."""
    _drop_output()
    return 141 if arguments[:1] == ["train"] else 0


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _expected(error: Exception) -> tuple[int, str] | None:
    """-> the exit code of an expected failure, and what it is in one sentence; None for a fault of
    ours: it keeps its traceback.
    """
    if hasattr(error, "format_message"):  # click's own: a wrong option or value
        return 2, error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
    if _no_memory(error):
        return 1, (
            "the memory of this machine is too small for that: try a smaller batch, "
            "window, width or length"
        )
    if isinstance(error, OSError):
        if error.errno is None:  # not the system's word: ours
            return None
        return 1, f"{error.filename or 'the output'} cannot be written or read ({why(error)})"
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return code, str(error)
    return None


def _no_memory(error: Exception) -> bool:
    words = str(error)
    too_large = "Storage size calculation overflowed" in words or "Overflow when unpacking" in words
    allocation = isinstance(error, RuntimeError | TypeError) and (lacks_memory(error) or too_large)
    return allocation or isinstance(error, MemoryError)


if __name__ == "__main__":
    main()
