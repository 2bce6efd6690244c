"""Something to drag: a drawing that follows its sliders, in any notebook that shows widgets."""

import io
from collections.abc import Callable
from typing import Any


def drag(draw: Callable[..., Any], **sliders: Any) -> Any:
    """-> a widget: the sliders, and below them what `draw` draws, given their values by name.

    `draw` returns a figure, axes, or several axes of one figure. The picture is an image, which
    needs no more of a notebook than to show it.
    """
    import matplotlib.pyplot as plt
    from ipywidgets import Image, VBox

    for name, slider in sliders.items():
        slider.description = slider.description or name
    picture = Image(format="png", width=720)

    def redraw(_: Any = None) -> None:
        drawn = draw(**{name: slider.value for name, slider in sliders.items()})
        first = drawn if hasattr(drawn, "savefig") or hasattr(drawn, "figure") else drawn[0]
        figure = first if hasattr(first, "savefig") else first.figure
        file = io.BytesIO()
        figure.savefig(file)
        plt.close(figure)
        picture.value = file.getvalue()

    redraw()
    for slider in sliders.values():
        slider.observe(redraw, "value")
    return VBox([*sliders.values(), picture])
