"""The drawings of chapters 1 to 4 show the numbers, shapes and sizes that they are given."""

import math
import re

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import rng
from matplotlib.colors import to_hex

from irann import figures
from irann.core import halting, noise
from irann.core.noise import Schedule
from irann.figures import attention, diffusion, mamba, thinking
from irann.figures.sketch import arrow, canvas, matrix


@pytest.fixture(autouse=True)
def house():
    with plt.rc_context():
        figures.use()
        yield
        plt.close("all")


def words(ax) -> list[str]:
    """What is written, in letters of at least nine points."""
    written = [text for text in ax.texts if text.get_text()]
    assert all(text.get_fontsize() >= figures.SMALL for text in written)
    return [text.get_text() for text in written]


def test_a_head_is_drawn_with_every_number_of_the_equations():
    generator = rng(0)
    x, *maps = (torch.randn(n, c, generator=generator) for n, c in ((4, 3), (3, 2), (3, 2), (3, 2)))
    held, numbers, letters = {}, [], ""
    for word in words(attention.head("that", x, *maps)):
        if " × " in word:  # a name stands after what it names
            held[word] = (numbers, letters)
            numbers, letters = [], ""
        elif word in [*"that"]:
            letters += word
        elif word:
            numbers.append(word)
    q, k, v = (x @ W for W in maps)
    z, past = q @ k.mT / 2**0.5, torch.ones(4, 4).tril() == 1
    a = z.masked_fill(~past, -torch.inf).softmax(-1)
    want = {f"$W_{name}$  3 × 2": (W, "") for name, W in zip("qkv", maps, strict=True)}
    want |= {
        f"{name}  4 × 2": (y, "that") for name, y in zip("qkvy", (q, k, v, a @ v), strict=True)
    }
    want |= {"x  4 × 3": (x, "that"), "z  4 × 4": (z, "that"), "masked  4 × 4": (z[past], "that")}
    for name, (values, beside) in want.items():
        assert held.pop(name) == ([f"{value:.1f}" for value in values.flatten()], beside), name
    assert held == {"a in %  4 × 4": ([f"{100 * value:.0f}" for value in a[past]], "thatthat")}
    assert numbers == ["softmax"]


def test_a_matrix_is_as_dark_as_its_numbers_are_large_and_empty_where_there_is_none():
    ax = canvas(6, 4)
    values = [[1.0, -2.0, torch.nan], [0.0, 0.5, -torch.inf]]
    matrix(ax, 1, 1, values, name="z", rows="ab", columns="xyz", cmap="Greys")
    assert words(ax) == ["1.0", "-2.0", "0.0", "0.5", *"ab", *"xyz", "z  2 × 3"]
    one, two, none, zero, half, _ = (cell.get_facecolor()[0] for cell in ax.patches)
    assert two < one < half < zero == none == 1
    assert two == plt.get_cmap("Greys")(0.75)[0]  # the largest, whatever its sign
    assert [cell.get_xy() for cell in ax.patches] == [(x, y) for y in (1, 2) for x in (1, 2, 3)]
    at = {text.get_text(): text.get_position() for text in ax.texts}
    assert (at["-2.0"], at["0.5"]) == ((2.5, 1.5), (2.5, 2.5))
    assert (at["a"][1], at["b"][1], at["x"][0], at["y"][0]) == (1.5, 2.5, 1.5, 2.5)
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 6), (4, 0))  # downwards, as text is read
    arrow(ax, (0, 1), (4, 2), "way")
    assert ax.texts[-1].get_position() == (2, 1.5)


def test_the_model_is_drawn_with_its_shapes():
    shown = "\n".join(words(attention.model(b=2, t=16, d=12, h=3, layers=4, v=65)))
    for shape in ("(2 16)", "(2 16 12)", "q, k, v: (2 16 4)", "z, a: (2 16 16)", "(2 16 48)"):
        assert shape in shown
    assert "(2 16 65)" in shown and "4 times" in shown and "E: 65 × 12" in shown
    for shape in ("P: 16 × 12", "$E^T$: 12 × 65", "3 heads"):
        assert shape in shown


def test_weights_and_losses_are_drawn_as_they_are():
    sure = torch.tensor([[99.0, 0, 0, 0], [0, 99.0, 0, 0], [0, 0, 0, 0]])  # of another key each
    rows = {c: {"bare": torch.zeros(3, 4), "scaled": sure} for c in (2, 4)}
    largest, slope = attention.widths(rows)
    assert [list(line.get_ydata()) for line in largest.lines] == [[0.25, 0.25], [0.75, 0.75]]
    assert [list(line.get_ydata()) for line in slope.lines] == [[0.75, 0.75], [0.25, 0.25]]
    assert [list(line.get_xdata()) for line in largest.lines] == [[2, 4]] * 2
    assert [line.get_label() for line in largest.lines] == ["bare", "scaled"]
    titles = [panel.get_title(loc="left") for panel in (largest, slope)]
    assert titles == ["largest weight", "slope that is left"]
    panels = attention.bars(rows[2])
    heights = [[bar.get_height() for bar in panel.patches] for panel in panels]
    assert heights == [[0.25] * 4, pytest.approx([1, 0, 0, 0])]
    assert [bar.get_center()[0] for bar in panels[0].patches] == [1, 2, 3, 4]
    assert [panel.get_title(loc="left") for panel in panels] == ["bare", "scaled"]
    assert (panels[0].get_xlabel(), panels[0].get_ylabel()) == ("key", "attention weight")
    assert len(attention.bars({"alone": sure[:1]})) == 1

    ax = attention.curve(
        plt.subplots()[1], [float(i) for i in range(40)], 500, color="C0", label=""
    )
    assert list(ax.lines[1].get_xdata()[:2]) == [5.5, 6.0]  # in thousands, centred
    assert list(ax.lines[1].get_ydata()[:2]) == [10.0, 11.0]
    attention.curve(ax, [1.0, 2.0, 6.0], 500, color="C0", label="")
    assert (*ax.lines[3].get_xdata(), *ax.lines[3].get_ydata()) == (1.0, 3.0)


def test_the_two_heads_drawn_large_are_the_ones_the_titles_say():
    weights = torch.eye(5).expand(2, 3, 5, 5).clone()
    weights[1, 0] = torch.eye(5).roll(-1, 1)  # looks at the one before
    weights[0, 1] = 0
    weights[0, 1, :, 2] = 0.9  # agrees on the third
    weights[0, 2] = 0
    weights[0, 2, :, 0] = 1  # on the first, where a head looks that has nothing to find
    axes = attention.maps(weights, "abcde").axes
    titled = {ax.get_title(loc="left"): ax.images[0] for ax in axes if ax.get_title(loc="left")}
    small = [f"{layer}.{head}" for layer in (1, 2) for head in (1, 2, 3)]
    large = ["the one before: layer 2, head 1", "one for all: layer 1, head 2"]
    assert list(titled) == [*small, *large]
    shown = [*weights.flatten(0, 1), weights[1, 0], weights[0, 1]]
    for image, want in zip(titled.values(), shown, strict=True):
        assert image.get_array().tolist() == want.tolist() and image.get_clim() == (0, 1)
    for name in large:
        ax = titled[name].axes
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")


def test_the_thinker_unrolled_shows_its_coins_its_losses_and_where_it_stops():
    ax = thinking.unrolled([0.1, 0.5, 0.3], [2.0, 1.5, 1.25], character="q")
    shown = " ".join(words(ax))
    p = halting.halting_distribution(torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64))
    assert "of 'q'" in shown and "weights\n3 times" in shown
    coins = re.findall(r"stop: \S+|takes the rest", shown)
    assert coins == ["stop: 0.10", "stop: 0.50", "takes the rest"]
    lines = [one.arrow_patch for one in ax.texts if getattr(one, "arrow_patch", None)]
    dashed = [line for line in lines if line.get_linestyle() == "--"]  # those to the three coins
    assert [to_hex(line.get_edgecolor()) for line in dashed] == [figures.PALE] * 3
    for r, (probability, nats) in enumerate(zip(p.tolist(), ("2.00", "1.50", "1.25")), 1):
        assert f"$p_{r}$ = {probability:.2f}" in shown and f"$z_{r} W$\n{nats} nats" in shown


def test_a_staircase_has_a_curve_for_each_number_of_hops_and_names_who_looks_where():
    right = torch.rand(5, 6, generator=rng(0))
    weights, names = torch.eye(3).roll(-1, 1), ["a=1", "b=a", "c=b"]
    left, beside = thinking.hops(right, weights, names, trained=4)
    *curves, trained = left.lines
    assert [curve.get_label() for curve in curves] == ["1", "2", "3"]
    for far, curve in enumerate(curves, 1):
        assert curve.get_xdata().tolist() == list(range(1, 7))
        assert curve.get_ydata() == pytest.approx(right[far].numpy())
    assert list(trained.get_xdata()) == [4, 4]
    for labels in (beside.get_xticklabels(), beside.get_yticklabels()):
        assert [tick.get_text() for tick in labels] == names
    assert (left.get_xlabel(), left.get_ylabel()) == ("round", "right answers")
    assert beside.images[0].get_array().tolist() == weights.tolist()
    assert (beside.get_xlabel(), beside.get_ylabel()) == ("looked at", "looks")


def test_stopping_is_the_closed_form():
    ax = thinking.stopping([1.5, 1.4, 1.4], 0.1, 0.4)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:3] == pytest.approx([0.4, 0.24, 0.36])
    weights = [0.4 * math.exp(-15), 0.24 * math.exp(-14), 0.36 * math.exp(-14)]
    assert heights[3:] == pytest.approx([w / sum(weights) for w in weights])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    rounds = sum(r * height for r, height in enumerate(heights[3:], 1))
    assert labels[1].endswith(f"= 0.10: {rounds:.2f} rounds") and labels[0].endswith("= 0.40")
    sides = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches)
    assert all(right <= left for (_, right), (left, _) in zip(sides, sides[1:]))  # none hides one
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "1\n1.5000",
        "2\n1.4000",
        "3\n1.4000",
    ]


def test_the_forward_process_shows_every_level_with_its_number():
    ax = diffusion.forward_process((0, 300, 1000), (1.0, 0.25, -0.5), (1.0, 0.8, 0.0))
    seen = " ".join(words(ax))
    for part in ("+1.00", "+0.25", "-0.50", "x_{300}", "= 0.80"):
        assert part in seen
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    ways = [(way.xy[0] > way.xyann[0], way.arrow_patch.get_linestyle()) for way in arrows]
    assert ways == [(True, "-"), (False, "--")] * 2  # there and back, between neighbours
    frames = [to_hex(box.get_edgecolor()) for box in ax.patches]
    assert frames == [
        figures.HUES["diffusion"].lower(),
        figures.INK,
        figures.INK,
    ]  # what is data stands out


def test_a_reverse_step_lands_where_the_package_lands():
    schedule = Schedule("cosine", 100)
    alpha_bar = torch.cat([torch.ones(1).double(), schedule.alpha_bar])
    a, b = alpha_bar[60].item(), alpha_bar[40].item()
    x, guess, eps = (torch.tensor([v], dtype=torch.float64) for v in (0.3, 0.7, -0.4))
    ax = diffusion.reverse_step(0.3, 0.7, 60, 40, alpha_bar, 1.0, -0.4)
    after = noise.step(guess, x, a, b, noise=lambda x: eps).item()
    shown = " ".join(words(ax))
    assert f"x_{{40}}$ = {after:+.2f}" in shown and "x_{60}$ = +0.30" in shown
    follows = (0.3 - a**0.5 * 0.7) / (1 - a) ** 0.5
    for name, value in (("\\hat x_0", 0.7), ("\\hat\\varepsilon", follows), ("\\varepsilon", -0.4)):
        assert f"${name}$ = {value:+.2f}" in shown
    terms = re.findall(r"([\d.]+) · \((.[\d.]+)\)", shown)
    assert [float(part) for _, part in terms][::2] == [0.7, -0.4]
    assert sum(float(weight) * float(part) for weight, part in terms) == pytest.approx(
        after, abs=0.02
    )


def test_a_film_has_a_row_for_each_level():
    ax = diffusion.film(["ab\n", "abc"], [[True, True, False], [True] * 3], [700, 20], "a film")
    assert ax.get_title(loc="left") == "a film"
    assert " ".join(words(ax)) == "a b \u21b5 a b c 700 20"
    shades = [sum(cell.get_facecolor()[:3]) for cell in ax.patches]
    assert len(set(shades)) == 2 and shades[2] == max(shades)  # the only one that will change
    height = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert (height["700"], height["20"]) == (height["\u21b5"], height["c"])


def test_schedules_draw_the_signal_and_its_snr():
    schedule = Schedule("sqrt", 10)
    alpha_bar = torch.cat([torch.ones(1).double(), schedule.alpha_bar])
    signal, snr, read = diffusion.schedules({"sqrt": (alpha_bar, [1.0, 0.5])}, [1, 6])
    assert torch.allclose(torch.tensor(signal.lines[0].get_ydata()), schedule.alpha_bar)
    assert torch.allclose(torch.tensor(snr.lines[0].get_ydata()), schedule.snr.log())
    assert list(read.lines[0].get_ydata()) == [1.0, 0.5]
    axes = diffusion.schedules(dict.fromkeys(("cosine", "sqrt", "linear"), (alpha_bar, [1])), [1])
    looks = [[(line.get_color(), line.get_linestyle()) for line in ax.lines] for ax in axes]
    assert looks[0] == looks[1] == looks[2] and len(set(looks[0])) == 3
    legend = axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["cosine", "sqrt", "linear"]
    levels = list(range(1, 11))
    for ax, at, what in ((signal, levels, "signal"), (snr, levels, "SNR"), (read, [1, 6], "read")):
        assert list(ax.lines[0].get_xdata()) == at and what in ax.get_title() + ax.get_title("left")


def test_humps_and_cosines_show_what_they_are_given():
    _, (left, right) = plt.subplots(1, 2)
    grid = torch.linspace(-1, 1, 5)
    diffusion.humps(left, grid, grid**2, grid.abs(), 0.25)
    assert list(left.lines[0].get_ydata()) == grid.abs().tolist()
    assert list(left.lines[1].get_xdata()) == [0.25, 0.25]
    drawn = [each.get_label() for each in (*left.collections, *left.lines)]
    assert drawn == ["true", "the model's", "$x_\\tau$"]
    true = zip(grid.tolist(), (grid**2).tolist(), strict=True)
    assert set(true) <= set(map(tuple, left.collections[0].get_paths()[0].vertices.tolist()))
    diffusion.cosines(right, torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]), "ab\n")
    assert right.images[0].get_array().tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["a", "b", "\u21b5"]
    assert right.images[0].get_clim() == (-1, 1) and right.figure.axes[-1].get_ylabel() == "cosine"


def test_a_ladder_draws_the_loss_and_the_bound_of_each_rung():
    curves = {"first": [(50, 2.0, 9.0), (100, 1.5, 4.0)], "then": [(50, 1.2, 3.5)]}
    curves |= {"last": [(50, 1.0, 3.0)]}
    axes = diffusion.ladder(curves, 3.3)
    for ax, column in zip(axes, (1, 2)):
        for line, (name, rows) in zip(ax.lines, curves.items()):
            assert line.get_label() == name
            drawn = list(zip(line.get_xdata(), line.get_ydata()))
            assert drawn == [(row[0], row[column]) for row in rows]
    assert list(axes[1].lines[-1].get_ydata()) == [3.3, 3.3]
    (legend,) = axes[0].figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert told == [*curves, "letter frequencies"]
    assert [ax.get_title(loc="left").split()[0] for ax in axes] == ["loss", "bound,"]


def test_the_unrolled_recurrence_shows_what_is_kept_added_and_held():
    ax = mamba.unrolled([0.5, 0.5, 0.37], [8, 0, 1], [8, 4, 2.48])
    said = words(ax)
    for word in ("$h_1$ = 8", "$h_3$ = 2.5", "$x_2$ = 0", "$\\times\\,$1/2", "$\\times\\,$0.37"):
        assert word in said
    across = {text.get_text().partition(" =")[0]: text.get_position()[0] for text in ax.texts}
    positions = [across[f"$h_{t}$"] for t in (1, 2, 3)]
    assert positions == sorted(positions)
    for name in "xy":
        assert [across[f"${name}_{t}$"] for t in (1, 2, 3)] == positions
    assert positions[1] < across["$\\times\\,$0.37"] < positions[2]


def test_the_tree_shows_every_pair_of_every_level():
    rows = [[(0.5, 8), (0.5, 0), (0.5, 1)]]
    rows.append([(0.5, 8), (0.25, 4), (0.5, 1)])
    rows.append([(0.5, 8), (0.25, 4), (0.125, 3)])
    ax = mamba.scan_tree(rows, [[(0, 1)], [(1, 2)]])
    said = words(ax)
    assert said.count("1/2, 8") == 3 and said.count("1/4, 4") == 2 and said.count("1/8, 3") == 1
    assert {"start", "level 1", "level 2", "$t$ = 3"} <= set(said)
    done, will_change, new = figures.INK, figures.PALE, figures.HUES["mamba"].lower()
    frames = [done, will_change, will_change, done, new, will_change, done, done, new]
    assert [to_hex(cell.get_edgecolor()) for cell in ax.patches] == frames
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    ways = [arrow for arrow in arrows if to_hex(arrow.arrow_patch.get_edgecolor()) == new]
    columns = sorted({cell.get_x() + cell.get_width() / 2 for cell in ax.patches})
    taken = [(arrow.xyann[0], arrow.xy[0]) for arrow in ways]
    assert taken == [(pytest.approx(a), pytest.approx(b)) for a, b in zip(columns, columns[1:])]


def test_the_block_shows_its_sizes():
    said = words(mamba.block(d=48, e=96, n=5, k=3, rank=2))
    assert {"$B$, $C$:\n2×5", "$\\delta$: 96", "$u$: 96", "conv1d\n3 positions"} <= set(said)
    assert {"gate: 96", "residual stream: 48"} <= set(said)
    assert [word for word in said if word.isdigit()] == ["48", "96", "96", "2"]  # along the way


def test_a_slider_that_is_moved_draws_anew(monkeypatch):
    seen, asked, stopping = [], [], thinking.stopping

    def noted(nats, *given):
        asked.append(given)
        return stopping(nats, *given)

    monkeypatch.setattr(thinking, "stopping", noted)

    def draw(value):
        seen.append(value)
        panels = plt.subplots(1, 2)[1]
        panels[0].plot([0, value])
        return panels

    def draw_on(ax, level, eta):
        seen.append((level, eta))
        ax.plot([0, level], [0, eta])

    options = attention.slide(draw, [1, 2, 3], value=2, name="c")
    ranges = diffusion.slide(draw_on, level=(500, 1, 1000), eta=(1.0, 0, 1))
    ends = [(slider.min, slider.max) for slider in ranges.children[:-1]]
    assert ends == [(1, 1000), (0, 1)]
    assert [type(slider.value) for slider in ranges.children[:-1]] == [int, float]
    for widget, moves in (
        (options, {"c": 3}),
        (ranges, {"level": 300, "eta": 0.5}),
        (thinking.drag([1.5, 1.4, 1.4], beta=0.1), {"beta": 0.2, "prior": 0.4}),
    ):
        *sliders, picture = widget.children
        assert [slider.description for slider in sliders] == list(moves)
        assert picture.value[:4] == b"\x89PNG"
        for slider, value in zip(sliders, moves.values()):
            before = bytes(picture.value)
            slider.value = value
            assert picture.value != before
    assert seen == [2, (500, 1.0), 3, (300, 1.0), (300, 0.5)] and not plt.get_fignums()
    assert asked == [(0.1, 0.3), (0.2, 0.3), (0.2, 0.4)]
