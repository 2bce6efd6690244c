"""A run that is overwritten stays aside until its successor has a checkpoint, or comes back."""

import os
import re
import shutil
from pathlib import Path

from .. import checkpoint

CHECKPOINT = r"(skipped-)?step-\d+"  # in `checkpoints`; others' files there are not the run's
LOG = r"metrics\.jsonl|events\.out\.tfevents\..*"  # beside it; the second is tensorboard's


def of_run(folder: Path, kind: str) -> list[Path]:
    """-> what is in a folder under a name of this kind."""
    found = folder.iterdir() if folder.exists() else ()
    return [path for path in found if re.fullmatch(kind, path.name)]


def put_aside(run: Path) -> None:
    """The checkpoints and logs of a run -> `replaced`, in one step that a kill cannot cut."""
    for log in of_run(run, LOG):
        os.replace(log, run / "checkpoints" / log.name)
    os.rename(run / "checkpoints", run / "replaced")


def remove(run: Path) -> None:
    for folder in of_run(run / "checkpoints", CHECKPOINT):
        shutil.rmtree(folder)
    for log in of_run(run, LOG):
        log.unlink()


def settle(run: Path) -> None:
    """What was put aside goes if the run has a checkpoint by now; else it is the run again."""
    checkpoints, aside = run / "checkpoints", run / "replaced"
    if aside.is_dir():
        if checkpoint.listed(run):
            for path in aside.iterdir():
                if not re.fullmatch(f"{CHECKPOINT}|{LOG}", path.name):
                    os.replace(path, checkpoints / path.name)
            shutil.rmtree(aside)
        else:
            shutil.rmtree(checkpoints, ignore_errors=True)
            os.rename(aside, checkpoints)
    for log in of_run(checkpoints, LOG) if checkpoints.is_dir() else ():
        os.replace(log, run / log.name)
