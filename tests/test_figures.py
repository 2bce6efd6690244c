"""Figures show the numbers they are given, and what is printed is what the package holds."""

import threading
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import refuses
from jupyter_client.manager import start_new_kernel
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties

from irann import figures, zoo
from irann.figures import attention


@pytest.fixture
def ax():
    with plt.rc_context():
        figures.use()
        figure, ax = plt.subplots()
        yield ax
        plt.close(figure)


def summaries(*values):
    return [{"low": v - 1, "median": v, "high": v + 1} for v in values]


def font_size(size):
    return FontProperties(size=size).get_size_in_points()


def data(line):
    return list(line.get_xdata()), list(line.get_ydata())


def ticks(axis):
    return [x for x in axis.get_major_locator().tick_values(10, 100) if 10 <= x <= 100]


def luminance(hue):
    parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(hue)]
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def arm(*points, exact=True, seeds=1):
    return {"curves": [list(points)] * seeds, "exact": exact}


def test_every_model_has_its_colour_and_a_new_one_is_given_another(ax):
    hues = [figures.colour(name) for name in zoo.MODELS]
    assert set(hues) == set(figures.HUES.values())
    assert figures.colour("newcomer") in figures.SPARE
    assert figures.colour("newcomer-page") == figures.colour("newcomer")
    names = [*zoo.MODELS, *(f"newcomer {i}" for i in range(5))]
    figures.race({"rows": dict.fromkeys(names, arm([1, 1.0, 2.0]))}, ax=ax)
    assert [line.get_label() for line in ax.lines] == names
    drawn = [line.get_color() for line in ax.lines]
    assert drawn[: len(hues)] == hues and set(drawn[len(hues) :]) == set(figures.SPARE)


def test_what_is_shown_is_the_source(capsys):
    def inner(x):
        return x

    figures.show(inner)
    figures.show(figures.colour)
    out = capsys.readouterr().out
    assert out.startswith("def inner(x):\n    return x\ndef colour(name: str) -> str:\n")
    assert out.endswith("len(SPARE)])\n")


@pytest.mark.parametrize(("against", "unit"), [("step", 1), ("seconds", 10), ("characters", 100)])
def test_a_learning_curve_s_mean_stands_at_the_end_of_what_it_is_of(ax, against, unit):
    ticks = []
    for i in range(1, 9):
        numbers = {"step": i, "seconds": 10 * i, "characters": 100 * i, "loss": float(i * i)}
        ticks.append(SimpleNamespace(**numbers, validation=i if i in (4, 8) else None))
    figures.learning_curve(ticks, against=against, references={"nothing": 4.0}, ax=ax)
    raw, mean, validation, reference = ax.lines
    assert data(raw) == ([unit * i for i in range(1, 9)], [i * i for i in range(1, 9)])
    of_two = [(i * i + (i - 1) ** 2) / 2 for i in range(2, 9)]
    assert data(mean) == ([unit * i for i in range(2, 9)], of_two)
    assert data(validation) == ([4 * unit, 8 * unit], [4, 8]) and reference.get_ydata()[0] == 4
    assert [(text.get_text(), text.xy[1]) for text in ax.texts] == [("nothing 4.00", 4)]
    assert mean.get_label() == "gpt, training, mean of 2 steps"
    assert ax.get_xlabel().startswith(against) and ax.get_ylabel() == "nats per character"
    with refuses("no step to draw"):
        figures.learning_curve([])
    with refuses("against is one of step, seconds, characters; got 'steps'"):
        figures.learning_curve(ticks, against="steps", ax=ax)


def test_a_long_learning_curve_is_smoothed_over_twenty_steps_in_the_hue_of_its_model(ax):
    ticks = [SimpleNamespace(step=i, loss=float(i), validation=2.0) for i in range(100)]
    with torch.device("meta"):  # whatever torch's default is
        figures.learning_curve(ticks, name="mamba", against="step", ax=ax, label="ours")
    raw, mean, validation = ax.lines  # no line of another text, unless it is asked for
    centred = (list(range(10, 91)), [9.5 + i for i in range(81)])
    assert mean.get_label() == "ours" and data(mean) == centred
    assert {line.get_color() for line in (raw, mean, validation)} == {figures.HUES["mamba"]}


@pytest.mark.parametrize(("against", "x"), [("characters", [2, 4]), ("seconds", [30, 60])])
def test_a_race_is_drawn_against_what_is_asked(ax, against, x):
    curve = ([2_000_000, 30.0, 1.5], [4_000_000, 60.0, 1.4])
    rows = {"gpt": arm(*curve, seeds=2), "diffusion": arm(*curve, exact=False)}
    figures.race({"rows": rows}, against=against, ax=ax)
    assert [data(line) for line in ax.lines] == [(x, [1.5, 1.4])] * 3
    assert [line.get_ls() for line in ax.lines] == ["-", "-", "--"]
    assert against in ax.get_xlabel() and "nats" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["gpt", "diffusion"]


def test_no_two_arms_of_a_race_share_a_colour(ax):
    deep = (f"gpt, as deep as {rounds} rounds" for rounds in (4, 6))
    names = ("gpt, equal parameters", "thinker", *deep)
    figures.race({"rows": dict.fromkeys(names, arm([2_000_000, 30.0, 1.5]))}, ax=ax)
    assert len({line.get_color() for line in ax.lines}) == 4
    assert ax.lines[1].get_color() == figures.HUES["thinker"]


def test_what_a_benchmark_says_of_models_is_drawn_where_it_is_known(ax):
    gpt = {"exact": True, "by_position": [[0, 2.5], [1, 2.0]]}
    diffusion = {"exact": False, "by_position": [[0, 3.0], [4, 2.5]]}
    rows = {"validation text": {}, "gpt": gpt, "diffusion": diffusion}
    figures.positions(rows, ax=ax)
    assert [line.get_label() for line in ax.lines] == ["gpt", "diffusion"]
    assert [data(line) for line in ax.lines] == [([1, 2], [2.5, 2.0]), ([1, 5], [3.0, 2.5])]
    assert [line.get_ls() for line in ax.lines] == ["-", "--"] and "position" in ax.get_xlabel()
    assert ax.get_xscale() == "log" and ax.xaxis.get_major_formatter()(20) == "20"
    assert ax.xaxis.get_major_formatter()(0.5) == "0.5" and ticks(ax.xaxis) == [10, 20, 50, 100]


def test_what_was_measured_is_drawn_on_the_axis_that_names_it(ax):
    rows = {"attention": summaries(5, 20), "mamba": summaries(6, 12)}
    figures.windows({"lengths": [128, 256], "rows": rows}, ax=ax)
    assert [data(line) for line in ax.lines] == [([128, 256], [5, 20]), ([128, 256], [6, 12])]
    assert [line.get_label() for line in ax.lines] == list(rows) and ax.get_ylabel() == "ms"
    hues = [figures.HUES["gpt"], figures.HUES["mamba"]]
    assert [line.get_color() for line in ax.lines] == hues
    ends = [(128, 4), (128, 6), (256, 19), (256, 21)]  # from the lowest to the highest
    assert set(ends) <= set(map(tuple, ax.collections[0].get_paths()[0].vertices.tolist()))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["128", "256"]
    ax.clear()

    sizes = [(100, 50), (100, 250), (1000, 50), (1000, 250)]
    speeds = zip(sizes, summaries(7, 70, 8, 80), strict=True)
    row = [{"prompt": p, "reply": r, "chars_per_second": speed} for (p, r), speed in speeds]
    figures.lengths({"thinker": row, "thinker-page": row}, ax=ax)
    assert [data(line) for line in ax.lines] == [([100, 1000], [70, 80])] * 2
    assert [line.get_ls() for line in ax.lines] == ["-", "--"]  # of one hue
    assert {line.get_color() for line in ax.lines} == {figures.HUES["thinker"]}
    assert ticks(ax.xaxis) == [10, 100]
    assert [line.get_label() for line in ax.lines] == ["thinker", "thinker-page"]
    assert "250" in ax.get_title("left") and ax.get_ylim()[1] > 81  # nothing is cut off
    assert "prompt" in ax.get_xlabel() and "per second" in ax.get_ylabel()
    ax.clear()

    (words, fewer), (rate, slow) = summaries(0.9, 0.8), summaries(50, 20)
    quick = {"steps": 4, "words": fewer, "chars_per_second": rate}
    row = [quick, {"steps": 8, "words": words, "chars_per_second": slow}]
    figures.parallel({"diffusion": row}, ax=ax)
    assert [data(line) for line in ax.lines] == [([50, 20], [0.8, 0.9])]
    assert [(text.get_text(), text.xy) for text in ax.texts] == [("4", (50, 0.8)), ("8", (20, 0.9))]
    assert "per second" in ax.get_xlabel() and "words" in ax.get_ylabel()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    figures.parallel({"thinker": row, "thinker-page": row}, ax=ax)
    assert [line.get_marker() for line in ax.lines[1:]] == ["o", "s"]  # of one hue
    names = ["diffusion", "thinker", "thinker-page"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names


def test_a_matrix_has_its_rows_down_and_its_columns_across(ax):
    figures.heat([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "a\n", "x y", ax=ax)
    assert ax.images[0].get_array().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "\u2423", "y"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "\u21b5"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("character", "character")
    assert len(ax.figure.axes) == 2  # the second is the bar
    assert ax.images[0].get_clim() == (0, 6)
    words = {"xlabel": "key", "ylabel": "query", "label": "weight", "title": "who", "cmap": "gray"}
    ax = figures.heat(torch.eye(2), "ab", "ab", vmax=4, **words)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.images[0].get_clim() == (0, 4) and ax.images[0].get_cmap().name == "gray"
    assert ax.get_title("left") == "who"
    assert ax.figure.axes[1].get_ylabel() == "weight"
    ax = figures.heat(torch.eye(2), "ab", "ab", bar=False)
    assert ax.figure.axes == [ax]
    plt.close("all")


def test_what_lies_on_a_gpu_is_drawn():
    class OnGPU(torch.Tensor):
        def __array__(self, *_, **__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def double(self):
            raise TypeError("the MPS framework doesn't support float64")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    weights = torch.eye(2).expand(1, 2, 2, 2)
    drawn = figures.heat(weights[0, 0].as_subclass(OnGPU), "ab", "ab")
    assert drawn.images[0].get_array().tolist() == [[1, 0], [0, 1]]
    assert attention.maps(weights.as_subclass(OnGPU), "ab").axes
    assert figures.on_text("ab", weights[0, 0, 0].as_subclass(OnGPU)).patches
    plt.close("all")


def test_pictures_are_sharp_and_their_letters_are_legible_on_their_own_white(ax):
    drawn = figures.on_text("ab", [0.0, 1.0], ax=ax).texts
    figures.lines(ax)
    heat = figures.heat([[1.0]], "a", "b")
    letters = [*ax.texts, *heat.get_xticklabels(), *heat.get_yticklabels()]
    assert min(text.get_fontsize() for text in letters) >= 9 and drawn
    assert plt.rcParams["figure.figsize"][0] * plt.rcParams["figure.dpi"] >= 700
    assert plt.rcParams["savefig.dpi"] == 2 * plt.rcParams["figure.dpi"]
    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize")
    assert min(font_size(plt.rcParams[name]) for name in (*sizes, "xtick.labelsize")) >= 9
    assert plt.rcParams["savefig.facecolor"] == plt.rcParams["figure.facecolor"] == "white"
    for hue in (figures.PALE, figures.INK):  # at least 4.5 to 1, as WCAG asks
        assert 1.05 / (luminance(hue) + 0.05) >= 4.5
    plt.close("all")


def test_a_text_is_broken_at_newlines_and_at_the_width(ax):
    figures.on_text("ab\ncdef", [0.0, 1, 2, 3, 4, 5, 6], width=3, cmap="gray", ax=ax)
    assert "".join(text.get_text() for text in ax.texts) == "ab\u21b5cdef"
    positions = [text.get_position() for text in ax.texts]
    assert positions == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2)]
    shades = [patch.get_facecolor()[0] for patch in ax.patches]
    assert shades[0] == 0 and shades[-1] == 1 and shades == sorted(shades)
    figures.on_text("ab", [2.0, 3.0], low=0.0, high=4.0, cmap="gray", ax=ax)  # not from the least
    assert [patch.get_facecolor()[0] for patch in ax.patches[-2:]] == pytest.approx(
        [0.5, 0.75], abs=0.01
    )
    for text, patch in zip(ax.texts, ax.patches, strict=True):  # legible on its own ground
        lights = sorted(luminance(hue) for hue in (text.get_color(), patch.get_facecolor()[:3]))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) > 3.5
    assert ax.figure.axes == [ax]
    figures.on_text("ab", [2.0, 3.0], label="nats", ax=ax)
    assert ax.figure.axes[1].get_ylabel() == "nats" and ax.figure.axes[1].get_ylim() == (2, 3)
    for text, values in (("abc", [1.0, 2.0]), ("", [])):  # `nll` has one value less than its text
        with refuses(rf"\({len(values)},\) for {len(text)} characters"):
            figures.on_text(text, values, ax=ax)


def test_a_cell_that_runs_long_says_so_every_second_and_at_its_end_how_long(monkeypatch):
    now, waited, shown = [100.0], [], []

    class Over(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            now.append(now[-1] + timeout)
            return len(waited) == 4

    def note(text, **_):
        shown.append(text["text/plain"])
        return SimpleNamespace(update=note)

    monkeypatch.setattr("IPython.display.display", note)
    monkeypatch.setattr(figures.lab, "time", SimpleNamespace(monotonic=lambda: now[-1]))
    figures.lab.Watch()._say(Over())
    assert waited == [3, 1, 1, 1]
    assert shown == ["running, 3 s", "running, 4 s", "running, 5 s", "6 s"]


def test_a_notebook_that_sets_the_style_again_is_watched_once(monkeypatch):
    registered = []
    events = SimpleNamespace(register=lambda name, call: registered.append(name))
    shell = SimpleNamespace(events=events, kernel=SimpleNamespace(_allow_stdin=True))
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: None)
    for _ in range(2):
        figures.lab.attend()
    assert registered == ["pre_run_cell", "post_run_cell"]


SLOW = """from irann import figures
figures.lab.PATIENCE = 0.3
figures.use()"""


def test_a_reader_sees_how_long_a_cell_takes_and_a_test_sees_nothing():
    manager, client = start_new_kernel()
    shown = []

    def note(message):
        if message["msg_type"] in ("display_data", "update_display_data"):
            shown.append(message["content"]["data"])

    try:
        for reader in (False, True):
            assert shown == []
            for cell in (SLOW, "import time; time.sleep(1)", "1"):
                reply = client.execute_interactive(
                    cell, allow_stdin=reader, output_hook=note, timeout=60
                )
                assert reply["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "application/javascript" in shown[0]
    *running, done = [each["text/html"] for each in shown[1:]]
    assert running and all("running" in line for line in running) and "running" not in done
