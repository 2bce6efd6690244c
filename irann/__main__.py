"""The command line: irann data | train | sample | chat | eval | bench.

Exit codes: 0 done, 1 disk or memory too small, 2 bad input, 3 bad checkpoint, 4 data not what it should be, 5 loss not finite,
6 run directory in use, 130 and 143 after SIGINT and SIGTERM with a checkpoint saved, 141 when nobody reads what training tells.
"""

import contextlib
import functools
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .settings import InputError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Small language models on tiny-shakespeare: train them, let them write, compare them.\n\n"
    "MODEL is gpt, thinker, thinker-page, diffusion or mamba. Begin with: irann train gpt --recipe demo",
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="gpt, thinker, thinker-page, diffusion or mamba")
]
Trained = Annotated[
    str, typer.Argument(metavar="MODEL", help="a model's name, or a run directory, or a checkpoint")
]
Corpus = Annotated[
    Path | None, typer.Option(metavar="FILE", help="another UTF-8 text instead of tiny-shakespeare")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: a GPU where there is one")]
SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command()
def data(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="also write train_encoded.npy, val_encoded.npy and vocab.json here"
        ),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where tiny-shakespeare already lies")
    ] = None,
):
    """Find or rebuild tiny-shakespeare, check it, and say where it came from."""
    from . import shakespeare

    text = shakespeare.load(corpus)
    print(f"tiny-shakespeare, {text.source}")
    print(
        f"{len(text.train):,} characters to train on, {len(text.val):,} to validate with, {len(text.vocabulary)} different ones"
    )
    print(f"SHA-256 {text.sha256}")
    if out:
        for path in text.write(out):
            print(f"wrote {path}")


@app.command("train")
def train_command(
    model: Model,
    recipe: Annotated[
        str, typer.Option(help="demo: about a minute; full: up to 90 minutes of two CPU cores")
    ] = "demo",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="change the recipe or the size, e.g. lr=1e-3"
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="where checkpoints and metrics go; default runs/MODEL-RECIPE"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest checkpoint of the run")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="throw the run in this directory away and start anew"),
    ] = False,
    corpus: Corpus = None,
    device: Device = "auto",
    log: Annotated[
        str | None,
        typer.Option(
            metavar="TOOL", help="also log to wandb or tensorboard (pip install 'irann[log]')"
        ),
    ] = None,
):
    """Train a model; Ctrl-C saves a checkpoint, --resume goes on from it."""
    from . import zoo
    from .training import progress, train

    if log not in (None, "wandb", "tensorboard"):
        raise InputError(f"--log is wandb or tensorboard; got {log!r}")
    pairs = dict(_pair(change) for change in changes or ())
    zoo.recipe(model, recipe, **pairs)  # names and values first, before anything is read
    text = _corpus(corpus)
    config, plan = zoo.recipe(model, recipe, **{"vocabulary": len(text.vocabulary)} | pairs)
    with _processes() as rank:
        network = zoo.build(model, config, seed=plan.seed).to(
            _device(device, int(os.environ.get("LOCAL_RANK", 0)))
        )
        run = run or Path("runs") / f"{model}-{recipe}"
        say = print if rank == 0 else lambda *_: None
        size = sum(p.numel() for p in network.parameters())
        say(
            f"{model}, {size:,} parameters, recipe {recipe}: {plan.steps:,} steps of {plan.batch * config.window:,} characters; {run}"
        )
        logger = _logger(log, run) if rank == 0 else None
        ticks = train(network, text, plan, run=run, resume=resume, overwrite=overwrite)
        tick = None
        with contextlib.closing(ticks):  # which saves, whatever fails here
            for tick in progress(ticks, plan.steps, mininterval=0.5) if rank == 0 else ticks:
                for note in tick.notes:
                    say(note)
                if logger:
                    logger(tick)
        if tick is None:
            say(f"nothing left to do: {run} has reached its {plan.steps:,} steps")
        elif tick.interrupted:
            say(f"stopped at step {tick.step:,}, saved in {tick.saved}; go on with: {_again()}")
            raise typer.Exit(128 + tick.interrupted)
        else:
            exact = "nats" if network.exact else "nats, a bound,"
            say(
                f"{tick.validation:.4f} {exact} per character of the validation part after {tick.seconds:,.0f} s; saved in {tick.saved}"
            )


@app.command(context_settings=SETTINGS)
def sample(
    context: typer.Context,
    model: Trained,
    prompt: Annotated[
        str, typer.Option(help="what the text begins with; - reads it from standard input")
    ] = "",
    length: Annotated[int, typer.Option(help="how many characters to write")] = 500,
    temperature: Annotated[
        float, typer.Option(help="how bold; 0 always takes the likeliest character")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="only the k likeliest characters; 0: all")] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="only the likeliest characters that hold this probability together"),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same text")] = None,
    device: Device = "auto",
):
    """Let a trained model write. Models may have settings of their own, such as --steps or --rounds."""
    from . import lm, zoo

    _first(model)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p} | _extra(context.args)
    for name, value in settings.items():  # what can be refused without loading is refused first
        if name in lm.SAMPLING:
            lm.SAMPLING[name].check(name, value)
    lm.LENGTH.check("length", length)
    network = zoo.load(model, device=_device(device), say=_warn)
    lm.check_settings(network, settings)
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(
                f"the prompt on standard input is not text ({error}): give it in UTF-8"
            ) from None
    shown = 0
    draft, drafts = None, lm.stream(network, prompt, length, seed=seed, **settings)
    try:
        for draft in drafts:
            if draft.forgotten and not shown:
                _warn(
                    f"the window holds {network.config.window} characters: the first {draft.forgotten:,} of the prompt are not read"
                )
            settled = network.vocabulary.decode(draft.ids[0, shown : draft.settled])
            print(settled, end="", flush=True)
            shown = max(shown, draft.settled)
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None
    print()


@app.command(context_settings=SETTINGS)
def chat(context: typer.Context, model: Trained = "gpt", device: Device = "auto"):
    """Talk with a trained model; /help lists what can be set."""
    from .chat import terminal

    _first(model)
    settings = _extra(context.args)
    for name in {"model", "say"} & set(settings):
        raise InputError(
            f"there is no --{name} here; a model is named without one, as in: irann chat mamba --temp 0.8"
        )
    terminal.main(model, device=_device(device), **settings)


@app.command("eval")
def eval_command(model: Trained, corpus: Corpus = None, device: Device = "auto"):
    """Measure nats per character over the whole validation part, every character once."""
    from . import zoo
    from .text import Text
    from .training import evaluate

    network = zoo.load(model, device=_device(device), say=_warn)
    text = _corpus(corpus)
    if text.vocabulary != network.vocabulary:
        everything = text.vocabulary.decode(text.train) + text.vocabulary.decode(text.val)
        try:
            text = Text.of(
                everything, vocabulary=network.vocabulary, source=text.source, sha256=text.sha256
            )
        except ValueError as error:
            raise InputError(
                f"{error}; if the model was trained on another text, give that with --corpus FILE"
            ) from None
    print(evaluate(network, text))
    print(
        f"windows of {network.config.window} characters that do not overlap, every character once; {text.source}"
    )


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="scan: the scan against others; all: trained models too; gpt, thinker-page, diffusion or mamba: that one alone; "
            "models, models-long, thinker, thinker-long, nanogpt: races, trained side by side"
        ),
    ] = "all",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="small sizes, to see whether it runs: about three minutes for all"
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="where the report goes; bench-report, or bench-report/quick"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="how often a race is run")] = 3,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, mps or auto: what a race is trained on; all else is measured on the CPU"
        ),
    ] = "cpu",
):
    """Time the selective scan against others, compare the trained models, or train models side by side. Goes on where it stopped."""
    from .bench import suite as benchmark

    benchmark.main(
        what,
        quick=quick,
        out=out or Path("bench-report") / ("quick" if quick else ""),
        seeds=seeds,
        device=_device(device),
    )


def _first(model: str) -> None:
    if model.startswith("-"):
        raise InputError(
            f"the model comes first, then what is set, as in: irann sample gpt --seed 1; got {model!r}"
        )


def _pair(change: str) -> tuple[str, str]:
    name, equals, value = change.partition("=")
    if not equals or not name:
        raise InputError(f"--set takes NAME=VALUE, such as lr=1e-3; got {change!r}")
    return name.strip(), value.strip()


def _extra(arguments: list[str]) -> dict[str, str]:
    """--name value, or --name=value, left over from the command line -> a dict."""
    extra, rest = {}, list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest):
            raise InputError(
                f"{name!r} means nothing here: a model's own settings are given as --name value"
            )
        extra[name[2:].replace("-", "_")] = value if equals else rest.pop(0)
    return extra


def _corpus(path: Path | None):
    """tiny-shakespeare, or any other UTF-8 text with a vocabulary of its own."""
    from . import shakespeare
    from .text import read_text

    return shakespeare.load() if path is None else read_text(path)


def _device(name: str, rank: int = 0):
    import torch

    gpu = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    name = gpu if name == "auto" else name
    if name not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device is cpu, cuda, mps or auto; got {name!r}")
    if name != "cpu" and name != gpu:
        raise InputError(f"--device {name}: there is none here; use cpu or auto")
    return (
        torch.device(name, rank % torch.cuda.device_count())
        if name == "cuda"
        else torch.device(name)
    )


@contextlib.contextmanager
def _processes():
    """Under torchrun, join the other processes -> this one's rank."""
    if "LOCAL_RANK" not in os.environ:
        yield 0
        return
    import torch
    import torch.distributed as dist

    if (
        torch.cuda.is_available()
    ):  # NCCL talks from the current GPU, which is the first one until someone says so
        torch.cuda.set_device(_device("cuda", int(os.environ["LOCAL_RANK"])))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _logger(tool: str | None, run: Path):
    """-> a function of ticks that writes to the tool; it opens it with the first. Raises ValueError when it is not installed."""
    if tool is None:
        return None
    try:
        if tool == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = functools.cache(lambda: SummaryWriter(run))
            return lambda tick: [
                writer().add_scalar(name, value, tick.step) for name, value in _row(tick).items()
            ]
        import wandb

        session = functools.cache(lambda: wandb.init(project="irann", name=run.name, dir=run))
        return lambda tick: session().log(_row(tick), step=tick.step)
    except ImportError:
        raise InputError(f"--log {tool} needs {tool}: pip install 'irann[log]'") from None


def _row(tick) -> dict[str, float]:
    row = {
        "loss": tick.loss,
        "lr": tick.lr,
        "chars_per_second": tick.chars_per_second,
        **tick.parts,
    }
    return row | ({"validation": tick.validation} if tick.validation is not None else {})


def _again() -> str:
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return shlex.join(["irann", *words, "--resume"])


def _warn(message: str) -> None:
    print(f"irann: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every expected failure is one sentence on stderr and an exit code."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        code = app(arguments or ["--help"], standalone_mode=False, prog_name="irann")
        sys.stdout.flush()  # here a full disk or a reader that left is still met below
        sys.exit(code if isinstance(code, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error.__context__ or error, BrokenPipeError):
            raise
        # the reader of our output left, as `| head` does, and click may have made an exit of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141 if arguments[:1] == ["train"] else 0)
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        _warn(_words(error).rstrip("."))
        try:
            sys.stdout.flush()
        except OSError:  # it was our own output that could not be written, and Python would try again while it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)


def _code_of(error: Exception) -> int | None:
    """-> the exit code of an expected failure, None for a fault of ours, which deserves its traceback."""
    from .checkpoint import CheckpointError, DiskError
    from .shakespeare import CorpusError
    from .training import InUse, NotFinite

    codes = {
        CheckpointError: 3,
        CorpusError: 4,
        NotFinite: 5,
        InUse: 6,
        ValueError: 2,
        DiskError: 1,
        OSError: 1,
    }
    if hasattr(error, "format_message"):  # click's own: a wrong option or value
        return 2
    if _no_memory(error):
        return 1
    return next((code for kind, code in codes.items() if isinstance(error, kind)), None)


def _no_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate" in str(error) and "memory" in str(error)
    )


def _words(error: Exception) -> str:
    """-> an expected failure in one sentence."""
    from .checkpoint import why

    if hasattr(error, "format_message"):
        return error.format_message()
    if _no_memory(error):
        return "the memory of this machine is too small for that: try a smaller batch, window, width or length"
    if isinstance(error, OSError):
        return f"{error.filename or 'the output'} cannot be written or read ({why(error)})"
    return str(error)


if __name__ == "__main__":
    main()
