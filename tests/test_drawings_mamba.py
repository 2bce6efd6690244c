"""The schematics of chapter 4 show the numbers and sizes that they are given."""

import matplotlib
import pytest
from matplotlib.colors import to_hex

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from irann import figures
from irann.figures import mamba


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def words(ax) -> list[str]:
    assert all(text.get_fontsize() >= figures.SMALL for text in ax.texts)
    return [text.get_text() for text in ax.texts]


def test_the_unrolled_recurrence_shows_what_is_kept_added_and_held():
    said = words(mamba.unrolled([0.5, 0.5, 0.37], [8, 0, 1], [8, 4, 2.48]))
    for word in ("$h_1$ = 8", "$h_3$ = 2.5", "$x_2$ = 0", "$\\times\\,$1/2", "$\\times\\,$0.37"):
        assert word in said


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


def test_the_block_shows_its_sizes():
    said = words(mamba.block(d=48, e=96, n=5, k=3, rank=2))
    assert {"48", "96", "2", "$B$, $C$:\n2×5", "$\\delta$: 96", "conv1d\n3 positions"} <= set(said)
