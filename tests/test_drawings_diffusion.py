"""irann.figures.diffusion: the numbers that the schematics of chapter 3 show are those of the
equations."""

import re

import matplotlib.pyplot as plt
import pytest
import torch

from irann.core import noise
from irann.core.noise import Schedule
from irann.figures import SMALL, diffusion


def letters(ax):
    found = [text for text in ax.texts if text.get_text()]
    assert all(text.get_fontsize() >= SMALL for text in found)
    return " ".join(text.get_text() for text in found)


def test_the_forward_process_shows_every_level_with_its_number():
    ax = diffusion.forward_process((0, 300, 1000), (1.0, 0.25, -0.5), (1.0, 0.8, 0.0))
    seen = letters(ax)
    for part in ("+1.00", "+0.25", "-0.50", "x_{300}", "= 0.80"):
        assert part in seen
    ways = [(text.xy[0] > text.xyann[0]) for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert ways == [True, False] * 2  # there and back, between neighbours
    plt.close()


def test_a_reverse_step_lands_where_the_package_lands():
    schedule = Schedule("cosine", 100)
    alpha_bar = torch.cat([torch.ones(1).double(), schedule.alpha_bar])
    a, b = alpha_bar[60].item(), alpha_bar[40].item()
    x, guess, eps = (torch.tensor([v], dtype=torch.float64) for v in (0.3, 0.7, -0.4))
    ax = diffusion.reverse_step(0.3, 0.7, 60, 40, alpha_bar, 1.0, -0.4)
    after = noise.step(guess, x, a, b, noise=lambda x: eps).item()
    shown = letters(ax)
    assert f"x_{{40}}$ = {after:+.2f}" in shown and "x_{60}$ = +0.30" in shown
    terms = re.findall(r"([\d.]+) · \((.[\d.]+)\)", shown)
    assert [float(part) for _, part in terms][::2] == [0.7, -0.4]
    assert sum(float(weight) * float(part) for weight, part in terms) == pytest.approx(
        after, abs=0.02
    )
    plt.close()


def test_a_film_has_a_row_for_each_level():
    ax = diffusion.film(["ab\n", "abc"], [[True, True, False], [True] * 3], [700, 20], "a film")
    assert "a film" in (ax.get_title(), ax.get_title(loc="left"))  # by the style in force
    assert letters(ax) == "a b \u21b5 a b c 700 20"
    shades = [sum(cell.get_facecolor()[:3]) for cell in ax.patches]
    assert len(set(shades)) == 2 and shades[2] == max(shades)  # the only one that will change
    plt.close()


def test_schedules_draw_the_signal_and_its_snr():
    schedule = Schedule("sqrt", 10)
    alpha_bar = torch.cat([torch.ones(1).double(), schedule.alpha_bar])
    signal, snr, read = diffusion.schedules({"sqrt": (alpha_bar, [1.0, 0.5])}, [1, 6])
    assert torch.allclose(torch.tensor(signal.lines[0].get_ydata()), schedule.alpha_bar)
    assert torch.allclose(torch.tensor(snr.lines[0].get_ydata()), schedule.snr.log())
    assert list(read.lines[0].get_ydata()) == [1.0, 0.5]
    plt.close()


def test_humps_and_cosines_show_what_they_are_given():
    _, (left, right) = plt.subplots(1, 2)
    grid = torch.linspace(-1, 1, 5)
    diffusion.humps(left, grid, grid**2, grid.abs(), 0.25)
    assert list(left.lines[0].get_ydata()) == grid.abs().tolist()
    assert list(left.lines[1].get_xdata()) == [0.25, 0.25]
    true = zip(grid.tolist(), (grid**2).tolist(), strict=True)
    assert set(true) <= set(map(tuple, left.collections[0].get_paths()[0].vertices.tolist()))
    diffusion.cosines(right, torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]), "ab\n")
    assert right.images[0].get_array().tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["a", "b", "\u21b5"]
    plt.close("all")


def test_a_slider_that_is_moved_draws_anew():
    seen = []

    def draw(ax, level, eta):
        seen.append((level, eta))
        ax.plot([0, level], [0, eta])

    *sliders, picture = diffusion.slide(draw, level=(500, 1, 1000), eta=(1.0, 0, 1)).children
    first = picture.value
    ends = [(slider.description, slider.min, slider.max) for slider in sliders]
    assert ends == [("level", 1, 1000), ("eta", 0, 1)]
    sliders[0].value = 300
    assert seen == [(500, 1.0), (300, 1.0)] and picture.value != first
    assert not plt.get_fignums()
