"""The drawings of chapter 1 show the numbers and shapes that they are given."""

import matplotlib.pyplot as plt
import pytest
import torch

from irann import figures
from irann.figures import attention as drawings
from irann.figures.sketch import canvas, matrix


@pytest.fixture(autouse=True)
def house():
    with plt.rc_context():
        figures.use()
        yield
        plt.close("all")


def words(ax):
    return [text.get_text() for text in ax.texts]


def test_a_head_is_drawn_with_every_number_of_the_equations():
    generator = torch.Generator().manual_seed(0)
    x, *maps = (torch.randn(n, c, generator=generator) for n, c in ((4, 3), (3, 2), (3, 2), (3, 2)))
    shown = words(drawings.head("that", x, *maps))
    q, k, v = (x @ W for W in maps)
    z = (q @ k.mT / 2**0.5).masked_fill(torch.ones(4, 4).triu(1) == 1, -torch.inf)
    a = z.softmax(-1)
    for values in (x, *maps, q, k, v, z[3], a @ v):
        for value in values.flatten().tolist():
            assert f"{value:.1f}" in shown
    for value in a[3].tolist():
        assert f"{100 * value:.0f}" in shown
    assert "x  4 × 3" in shown and "$W_q$  3 × 2" in shown and "masked  4 × 4" in shown
    assert not {"nan", "-inf", "inf"} & set(shown)


def test_a_matrix_is_as_dark_as_its_numbers_are_large_and_empty_where_there_is_none():
    ax = canvas(6, 4)
    values = [[1.0, -2.0, torch.nan], [0.0, 0.5, -torch.inf]]
    assert matrix(ax, 1, 1, values, name="z", rows="ab", columns="xyz", cmap="Greys") == (3, 2)
    assert words(ax) == ["1.0", "-2.0", "", "0.0", "0.5", "", *"ab", *"xyz", "z  2 × 3"]
    one, two, none, zero, half, _ = (cell.get_facecolor()[0] for cell in ax.patches)
    assert two < one < half < zero == none == 1


def test_the_model_is_drawn_with_its_shapes():
    shown = "\n".join(words(drawings.model(b=2, t=16, d=12, h=3, layers=4, v=65)))
    for shape in ("(2 16)", "(2 16 12)", "q, k, v: (2 16 4)", "z, a: (2 16 16)", "(2 16 48)"):
        assert shape in shown
    assert "(2 16 65)" in shown and "4 times" in shown and "E: 65 × 12" in shown
    for shape in ("P: 16 × 12", "$E^T$: 12 × 65", "3 heads"):
        assert shape in shown


def test_weights_and_losses_are_drawn_as_they_are():
    rows = {
        c: {"bare": torch.zeros(1, 4), "scaled": torch.tensor([[99.0, 0, 0, 0]])} for c in (2, 4)
    }
    largest, slope = drawings.widths(rows)
    assert [list(line.get_ydata()) for line in largest.lines] == [[0.25, 0.25], [1, 1]]
    assert [list(line.get_ydata()) for line in slope.lines] == [[0.75, 0.75], [0, 0]]
    assert [list(line.get_xdata()) for line in largest.lines] == [[2, 4]] * 2
    assert [line.get_label() for line in largest.lines] == ["bare", "scaled"]
    titles = [panel.get_title(loc="left") for panel in (largest, slope)]
    assert titles == ["largest weight", "slope that is left"]
    panels = drawings.bars(rows[2])
    assert [bar.get_height() for bar in panels[0].patches] == [0.25] * 4
    assert [bar.get_center()[0] for bar in panels[0].patches] == [1, 2, 3, 4]
    assert [panel.get_title(loc="left") for panel in panels] == ["bare", "scaled"]

    ax = drawings.curve(plt.subplots()[1], [float(i) for i in range(40)], 500, color="C0", label="")
    assert list(ax.lines[1].get_xdata()[:2]) == [5.5, 6.0]  # in thousands, centred
    assert list(ax.lines[1].get_ydata()[:2]) == [10.0, 11.0]


def test_the_two_heads_drawn_large_are_the_ones_the_titles_say():
    weights = torch.eye(5).expand(2, 3, 5, 5).clone()
    weights[1, 0] = torch.eye(5).roll(-1, 1)  # looks at the one before
    weights[0, 1] = 0
    weights[0, 1, :, 2] = 0.9  # agrees on the third
    weights[0, 2] = 0
    weights[0, 2, :, 0] = 1  # on the first, where a head looks that has nothing to find
    axes = drawings.maps(weights, "abcde").axes
    titled = {ax.get_title(loc="left"): ax.images[0] for ax in axes if ax.get_title(loc="left")}
    small = [f"{layer}.{head}" for layer in (1, 2) for head in (1, 2, 3)]
    large = ["the one before: layer 2, head 1", "one for all: layer 1, head 2"]
    assert list(titled) == [*small, *large]
    shown = [*weights.flatten(0, 1), weights[1, 0], weights[0, 1]]
    for image, want in zip(titled.values(), shown, strict=True):
        assert image.get_array().tolist() == want.tolist() and image.get_clim() == (0, 1)


def test_a_slider_redraws():
    drawn = []

    def draw(value):
        drawn.append(value)
        return plt.subplots(1, 2)[1]

    widget = drawings.slide(draw, [1, 2, 3], value=2, name="c")
    slider, picture = widget.children
    before = picture.value
    slider.value = 3
    assert drawn == [2, 3] and before[:4] == b"\x89PNG" and not plt.get_fignums()
