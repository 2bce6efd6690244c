"""Something to drag: a drawing that follows its sliders, in any notebook that shows widgets."""

import io
from collections.abc import Callable
from typing import Any


def drag(draw: Callable[..., Any], **sliders: Any) -> Any:
    """-> a widget: the sliders, and below them the figure that `draw` makes, given their values by
    name. It is shown as an image, which needs no more of a notebook than that.
    """
    import matplotlib.pyplot as plt
    from ipywidgets import Image, VBox

    for name, slider in sliders.items():
        slider.description = slider.description or name
    picture = Image(format="png", width=720)

    def redraw(_: Any = None) -> None:
        draw(**{name: slider.value for name, slider in sliders.items()})
        file = io.BytesIO()
        plt.savefig(file)
        plt.close()
        picture.value = file.getvalue()

    redraw()
    for slider in sliders.values():
        slider.observe(redraw, "value")
    return VBox([*sliders.values(), picture])
