"""python book/moving.py: the moving picture of the first page, book/images/writing.gif. Two models
answer one question; ink has settled, grey is a guess.
"""

import textwrap
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from irann import figures
from irann.chat.session import Session

QUESTION = "Who is there? Speak, and tell me what thou art."
SEEDS = {"gpt": 4, "diffusion": 4}
COUNT, WIDTH, LINES = 36, 44, 5
ROW, MARGIN = 20, 14


def frames_of(name: str) -> list:
    """-> moments of a reply, evenly spaced."""
    session = Session(name, seed=SEEDS[name], length=150, temperature=0.7)
    session.say(QUESTION)
    frames = list(session.reply())
    return [frames[round(i * (len(frames) - 1) / (COUNT - 1))] for i in range(COUNT)]


def draw(moments: dict) -> Image.Image:
    """One moment of every model, side by side -> a picture."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    mono = ImageFont.truetype(fonts / "DejaVuSansMono.ttf", 13)
    bold = ImageFont.truetype(fonts / "DejaVuSans-Bold.ttf", 13)
    half = 2 * MARGIN + round(mono.getlength("m" * WIDTH))
    picture = Image.new("RGB", (half * len(moments), (LINES + 1) * ROW + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    for column, (name, frame) in enumerate(moments.items()):
        left = column * half + MARGIN
        pen.text((left, MARGIN), name, figures.colour(name), bold)
        read = 0
        shown = frame.text.strip("\n")
        skipped = len(frame.text) - len(frame.text.lstrip("\n"))
        row = 1
        for line in shown.split("\n"):
            for part in textwrap.wrap(line, WIDTH, drop_whitespace=False) or [""]:
                if row <= LINES:
                    for i, character in enumerate(part):
                        settled = skipped + read + i < frame.settled
                        at = (left + mono.getlength("m" * i), MARGIN + row * ROW)
                        pen.text(at, character, figures.INK if settled else "#a0a0a0", mono)
                read += len(part)
                row += 1
            read += 1
    return picture


def main() -> None:
    replies = {name: frames_of(name) for name in SEEDS}
    pictures = [draw({name: replies[name][i] for name in replies}) for i in range(COUNT)]
    small = [picture.quantize(16) for picture in pictures]
    times = [160] * (COUNT - 1) + [4000]
    path = Path(__file__).parent / "images" / "writing.gif"
    small[0].save(path, save_all=True, append_images=small[1:], duration=times, loop=0)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
