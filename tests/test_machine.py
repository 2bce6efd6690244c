"""irann.machine: threads that wait let others work, unless the reader chose otherwise."""

import itertools
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROGRAMS
from helpers import apart, threads

import irann
from irann import machine

FREE = {k: v for k, v in os.environ.items() if k not in machine.CHOSEN and k != "OMP_NUM_THREADS"}
two_cores = pytest.mark.skipif(machine.cores() < 2, reason="one core waits for nobody")


def burnt(with_irann: str) -> float:
    """-> seconds that torch's other thread spent on waiting, in a process of its own."""
    return float(apart(PROGRAMS / "waiting.py", with_irann, env=FREE).stdout)


@two_cores
def test_waiting_costs_next_to_nothing_although_torch_was_imported_first():
    assert burnt("irann") < 0.2 * burnt("torch")


@pytest.mark.parametrize("name", machine.CHOSEN)
def test_who_sets_how_to_wait_decides(name, monkeypatch):
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine.threading, "enumerate", list)
    monkeypatch.setattr(machine.threading, "Thread", lambda **_: pytest.fail("a watcher"))
    monkeypatch.setenv(name, "ACTIVE")
    machine.share_cores()
    assert not machine.waits_politely()


def test_where_one_thread_computes_no_pool_is_started(monkeypatch):
    started = []
    monkeypatch.setattr(machine.threading, "Thread", lambda **options: started.append(options))
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 1)
    machine.share_cores()
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: machine.MOST_CORES + 1)
    machine.share_cores()
    assert not started


def test_the_watcher_is_for_two_threads_to_as_many_as_most_cores(monkeypatch):
    for name in machine.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    for n, waits in ((1, False), (2, True), (8, True), (9, False)):
        monkeypatch.setattr(machine.torch, "get_num_threads", lambda n=n: n)
        assert machine.waits_politely() == waits


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7})
    assert machine.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # not on every system
    assert machine.cores() == 64


def test_one_watcher_is_enough_and_it_ends_before_python_does(monkeypatch):
    def stand_in(over, threads):
        over.wait()

    registered = []
    monkeypatch.setattr(machine, "_watch", stand_in)
    monkeypatch.setattr(machine, "waits_politely", lambda: True)
    monkeypatch.setattr(machine.atexit, "register", lambda *call: registered.append(call))
    machine.share_cores()
    machine.share_cores()
    [(end, over, watcher)] = registered
    assert watcher.is_alive() and watcher.daemon
    end(over, watcher)
    assert not watcher.is_alive()


def test_a_pool_stands_by_while_others_compute_and_until_four_looks_find_them_quiet(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)

    def watched(load, *others):
        """-> what happens before and at each look at how many cores others keep, and at the end."""
        seen = [[]]
        clocks = iter(enumerate(itertools.accumulate(others, initial=0)))
        over = threading.Event()
        pool = SimpleNamespace(release=lambda: seen[-1].append("released"))
        monkeypatch.setattr(machine, "SecondPool", lambda n: seen[-1].append(n) or pool)
        monkeypatch.setattr(machine, "_clocks", lambda: next(clocks))
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
        monkeypatch.setattr(over, "wait", lambda _: seen.append([]) or len(seen) > 1 + len(others))
        machine._watch(over, 3)
        return seen

    quiet = [[], [], []]
    assert watched(1.4, 0.2, 0.25, 0, 0, 0, 0.5, 0, 0, 0, 0, 0) == [
        *([], [], [3]), *quiet, [], *quiet, ["released"], [], [],
    ]  # fmt: skip
    assert watched(1.5, 0.25) == [[3], [], ["released"]]


def test_others_are_all_that_computes_but_this_process(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text(
        "cpu  100 20 30 4000 500 6 7 8 900 90\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    )
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    monkeypatch.setattr(time, "process_time", lambda: 0.25)
    monkeypatch.setattr(time, "monotonic", lambda: 9.0)
    ticks = 100 + 20 + 30 + 6 + 7 + 8  # neither idle nor waiting for a disk; guests are users
    assert machine._clocks() == (9.0, ticks / os.sysconf("SC_CLK_TCK") - 0.25)


def test_what_is_too_small_to_share_is_one_threads_work_and_the_count_is_put_back(monkeypatch):
    for name in (*machine.CHOSEN, *machine.THREADS):
        monkeypatch.delenv(name, raising=False)
    for n in (1, 2, machine.MOST_CORES + 1):
        with threads(n):
            small = 1 if n <= machine.MOST_CORES else n
            for work, expected in ((machine.SMALL, small), (machine.SMALL + 1, n)):
                with pytest.raises(KeyError), machine.threads_for(work):
                    assert machine.torch.get_num_threads() == expected
                    raise KeyError
                assert machine.torch.get_num_threads() == n


@pytest.mark.parametrize("name", [*machine.CHOSEN, *machine.THREADS])
def test_a_thread_count_that_the_reader_set_is_kept(name, monkeypatch):
    for other in (*machine.CHOSEN, *machine.THREADS):
        monkeypatch.delenv(other, raising=False)
    counts = []
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine.torch, "set_num_threads", counts.append)
    with machine.threads_for(1):
        assert counts == [1]
    counts.clear()
    monkeypatch.setenv(name, "2")
    with machine.threads_for(1):
        assert not counts


def test_a_small_training_and_a_text_are_one_threads_work(small, monkeypatch):
    for name in (*machine.CHOSEN, *machine.THREADS):
        monkeypatch.delenv(name, raising=False)
    seen = []
    with threads(2):
        config, recipe = irann.recipe("gpt", "tiny", steps=2, evaluate_every=0)
        model = irann.build("gpt", config, seed=1)
        next(model.children()).register_forward_pre_hook(
            lambda *_: seen.append(machine.torch.get_num_threads())
        )
        next(irann.train(model, small, recipe))
        irann.generate(model, "a", 3)
        assert len(seen) >= 4 and set(seen) == {1}
        assert machine.torch.get_num_threads() == 2


def test_the_cache_is_where_it_is_said_to_be(monkeypatch):
    for chosen, xdg, folder in (
        ("/a", "/b", "/a"),
        ("a", "/b", Path.cwd() / "a"),
        ("", "/b", "/b/irann"),
        ("", "", "/home/will/.cache/irann"),
    ):
        monkeypatch.setenv("IRANN_CACHE", chosen)
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        monkeypatch.setenv("HOME", "/home/will")
        assert machine.cache() == Path(folder)
