"""The drawings of chapter 2 show the numbers they are given."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

from irann import figures
from irann.core import halting
from irann.figures import thinking


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        figures.use()
        yield
        plt.close("all")


def words(ax):
    return " ".join(text.get_text() for text in ax.texts)


def test_the_thinker_unrolled_shows_its_coins_its_losses_and_where_it_stops():
    ax = thinking.unrolled([0.1, 0.5, 0.3], [2.0, 1.5, 1.25], character="q")
    shown = words(ax)
    p = halting.halting_distribution(torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64))
    assert "of 'q'" in shown and "takes the rest" in shown and "stop: 0.30" not in shown
    for r, (probability, nats) in enumerate(zip(p.tolist(), ("2.00", "1.50", "1.25")), 1):
        assert f"$p_{r}$ = {probability:.2f}" in shown and f"{nats} nats" in shown
    assert min(text.get_fontsize() for text in ax.texts if text.get_text()) >= figures.SMALL


def test_a_staircase_has_a_curve_for_each_number_of_hops_and_names_who_looks_where():
    right = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    weights, names = torch.eye(3), ["a=1", "b=a", "c=b"]
    left, beside = thinking.hops(right, weights, names, trained=4)
    *curves, trained = left.lines
    assert [curve.get_label() for curve in curves] == ["1", "2", "3"]
    for far, curve in enumerate(curves, 1):
        assert curve.get_xdata().tolist() == list(range(1, 7))
        assert curve.get_ydata() == pytest.approx(right[far].numpy())
    assert list(trained.get_xdata()) == [4, 4]
    assert [tick.get_text() for tick in beside.get_yticklabels()] == names
    assert beside.images[0].get_array().tolist() == weights.tolist()
    assert (beside.get_xlabel(), beside.get_ylabel()) == ("looked at", "looks")


def test_stopping_is_the_closed_form():
    ax = thinking.stopping([1.5, 1.4, 1.4], 0.1, 0.5)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:3] == pytest.approx([0.5, 0.25, 0.25])
    weights = [0.5 * math.exp(-15), 0.25 * math.exp(-14), 0.25 * math.exp(-14)]
    assert heights[3:] == pytest.approx([w / sum(weights) for w in weights])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    rounds = sum(r * height for r, height in enumerate(heights[3:], 1))
    assert labels[1].endswith(f"= 0.10: {rounds:.2f} rounds") and labels[0].endswith("= 0.50")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "1\n1.5000",
        "2\n1.4000",
        "3\n1.4000",
    ]


def test_the_sliders_redraw_the_picture():
    widget = thinking.drag([1.5, 1.4, 1.4], beta=0.1)
    *sliders, picture = widget.children
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG") and not plt.get_fignums()
    assert [slider.description for slider in sliders] == ["beta", "prior"]
    for slider in sliders:
        slider.value += 0.1
        assert bytes(picture.value) != before
        before = bytes(picture.value)
