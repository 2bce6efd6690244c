"""What `irann doctor` says: what is installed, used and wrong, to be pasted into a report."""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from . import checkpoint, kernels, machine, shakespeare, zoo
from .checkpoint import CheckpointError
from .settings import InputError
from .text import CorpusError

# No other variable is shown: an environment may hold secrets.
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CC", "TRITON_INTERPRET")
OURS = ("IRANN_CORPUS", "IRANN_CACHE", "IRANN_KERNEL")
OPTIONAL = ("ipywidgets", "jupyterlab", "matplotlib", "transformers", "triton")
ENOUGH = 1e9  # bytes on a disk: a run keeps three checkpoints of some 50 MB


def report() -> Iterator[str]:
    """Yields lines; the last ones say what is wrong, each with its way out."""
    problems: list[str] = []
    checks = {
        "irann": _versions,
        "torch": _torch,
        "scan": _scan,
        "corpus": _corpus,
        "weights": _weights,
        "runs": _runs,
        "disk": _disk,
    }
    for name, check in checks.items():
        for line in check(problems):
            yield f"{name:8} {_short(line)}"
    for problem in problems or ["nothing that shows from here"]:
        yield f"{'wrong':8} {_short(problem)}"


def _versions(problems: list[str]) -> Iterator[str]:
    import irann

    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"{irann.__version__} in {Path(__file__).parent}, {system}"
    installed = []
    for name in OPTIONAL:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            installed.append(f"no {name}")
    yield ", ".join(installed)
    if "no ipywidgets" in installed:
        problems.append('the chat of the notebooks is missing: pip install "irann[book]"')


def _torch(problems: list[str]) -> Iterator[str]:
    cores = machine.cores()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append("mps")
    yield (
        f"{torch.__version__}, {', '.join(gpus) or 'no GPU'}, {torch.get_num_threads()} "
        f"threads on {cores} cores"
    )
    known = {name: os.environ[name] for name in VARIABLES + OURS if name in os.environ}
    yield ", ".join(f"{name}={value}" for name, value in known.items()) or "no variables are set"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    patient = machine.waits_politely() or known.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    if load > cores / 2 and torch.get_num_threads() > 1 and not patient:
        problems.append(
            f"other work keeps {load:.1f} of {cores} cores busy, which can slow torch down "
            "many times: set OMP_WAIT_POLICY=PASSIVE"
        )


def _scan(problems: list[str]) -> Iterator[str]:
    lines = kernels.describe().splitlines()
    yield from lines
    asked_for = os.environ.get("IRANN_KERNEL") != "0"
    if asked_for and os.environ.get("CC", "").strip() and "no C kernel" in lines[0]:
        problems.append(
            f"CC is {os.environ['CC']!r}, and the scan's C kernel cannot be built with it"
        )


def _corpus(problems: list[str]) -> Iterator[str]:
    try:
        yield f"tiny-shakespeare, {shakespeare.load().source}"
    except CorpusError as error:
        yield "none"
        problems.append(str(error))


def _weights(problems: list[str]) -> Iterator[str]:
    whole = []
    for name in zoo.shipped():
        try:
            zoo.load(name)
            whole.append(name)
        except CheckpointError as error:
            problems.append(str(error))
    yield ", ".join(whole) or "none"


def _runs(problems: list[str]) -> Iterator[str]:
    none = True
    for run in sorted(Path("runs").glob("*")):
        try:
            if not checkpoint.listed(run):
                continue
            none = False
            folder, _, skipped = checkpoint.newest(run)
            yield f"{folder}"
            best, saved, skipped_for_it = checkpoint.best(run)  # what speaks may be another
            zoo.restore(saved, best)
            skipped += skipped_for_it
            problems += [f"skipped: {reason}" for reason in dict.fromkeys(skipped)]
        except (CheckpointError, InputError) as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{run} cannot be read ({checkpoint.why(error)})")
    if none:
        yield f"none in {Path('runs').absolute()}"


def _disk(problems: list[str]) -> Iterator[str]:
    for name in (".", "~"):
        folder = Path(os.path.expanduser(name)).absolute()
        try:
            free = shutil.disk_usage(folder).free
        except OSError:
            continue
        yield f"{free / 1e9:,.1f} GB free at {folder}"
        if free < ENOUGH:
            problems.append(f"the disk of {folder} is nearly full: free some space")


def _short(line: str) -> str:
    """-> a line without the name of the reader's home."""
    home = os.path.expanduser("~")
    whole = re.escape(home) + r"(?![\w-])"  # not the beginning of another's name
    return line if home in ("/", "~") else re.sub(whole, "~", line)
