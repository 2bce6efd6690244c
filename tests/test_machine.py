"""irann.machine: threads that wait let others work, unless the reader chose otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROGRAMS

import irann
from irann import machine

FREE = {k: v for k, v in os.environ.items() if k not in machine.CHOSEN and k != "OMP_NUM_THREADS"}
two_cores = pytest.mark.skipif(machine.cores() < 2, reason="one core waits for nobody")


def burnt(with_irann: str, **environment) -> float:
    """-> seconds that torch's other thread spent on waiting, in a process of its own."""
    tree = {"PYTHONPATH": str(Path(irann.__file__).parent.parent)}
    command = [sys.executable, PROGRAMS / "waiting.py", with_irann]
    done = subprocess.run(
        command, env=FREE | tree | environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@two_cores
def test_waiting_costs_next_to_nothing_although_torch_was_imported_first():
    assert burnt("irann") < 0.2 * burnt("torch")


@two_cores
def test_who_sets_how_to_wait_decides():
    assert burnt("irann", OMP_WAIT_POLICY="ACTIVE") > 0.05
    assert burnt("irann", GOMP_SPINCOUNT="100000000") > 0.05


def test_where_one_thread_computes_no_pool_is_started(monkeypatch):
    started = []
    monkeypatch.setattr(machine.threading, "Thread", lambda **options: started.append(options))
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 1)
    machine.share_cores()
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: machine.MOST_CORES + 1)
    machine.share_cores()
    assert not started


def test_what_is_too_small_to_share_is_one_threads_work_and_the_count_is_put_back(monkeypatch):
    for name in (*machine.CHOSEN, *machine.THREADS):
        monkeypatch.delenv(name, raising=False)
    before = machine.torch.get_num_threads()
    try:
        for threads in (1, 2, machine.MOST_CORES + 1):
            machine.torch.set_num_threads(threads)
            small = 1 if threads <= machine.MOST_CORES else threads
            for work, expected in ((machine.SMALL, small), (machine.SMALL + 1, threads)):
                with pytest.raises(KeyError), machine.threads_for(work):
                    assert machine.torch.get_num_threads() == expected
                    raise KeyError
                assert machine.torch.get_num_threads() == threads
    finally:
        machine.torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*machine.CHOSEN, *machine.THREADS])
def test_a_thread_count_that_the_reader_set_is_kept(name, monkeypatch):
    monkeypatch.setenv(name, "2")
    counts = []
    monkeypatch.setattr(machine.torch, "set_num_threads", counts.append)
    with machine.threads_for(1):
        assert not counts


def test_a_small_training_and_a_text_are_one_threads_work(small, monkeypatch):
    for name in (*machine.CHOSEN, *machine.THREADS):
        monkeypatch.delenv(name, raising=False)
    before, seen = machine.torch.get_num_threads(), []
    machine.torch.set_num_threads(2)
    try:
        config, recipe = irann.recipe("gpt", "tiny", steps=2, evaluate_every=0)
        model = irann.build("gpt", config, seed=1)
        next(model.children()).register_forward_pre_hook(
            lambda *_: seen.append(machine.torch.get_num_threads())
        )
        next(irann.train(model, small, recipe))
        irann.generate(model, "a", 3)
        assert len(seen) >= 4 and set(seen) == {1}
        assert machine.torch.get_num_threads() == 2
    finally:
        machine.torch.set_num_threads(before)
