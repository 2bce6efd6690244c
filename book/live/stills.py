"""Pictures of the live pieces, for readers without scripts: book/live/still-*.png and stills.css.

python book/live/stills.py _build/html      after the site has been built
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
WAIT = 120_000
# What to do in a piece, and what is then there to be photographed
READY = {
    "cost": (None, ".irann-status:has-text('blind guess')"),
    "attention": (None, ".irann-bars li"),
    "rounds": (None, ".irann-status:has-text('Under each')"),
    "denoise": ("fill the gaps", ".irann-status:has-text('Written in')"),
    "gaps": ("fill the gaps", ".irann-status:has-text('Written in')"),
    "forget": (None, ".irann-status:has-text('How much')"),
    "write": ("write", ".irann-status:has-text('Written')"),
    "chat": ("say it", ".irann-status:has-text('has answered')"),
}
RULE = ".irann-still-{0} {{ background-image: url(still-{0}.png); aspect-ratio: {1}; }}\n"
FIRST = """/* Written by stills.py: what is seen of the live pieces where no script runs. */
.irann-still { background-size: contain; background-repeat: no-repeat; max-width: 720px; }
"""


def main(site: str) -> None:
    css = FIRST
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 800, "height": 1600}, color_scheme="light")
        page.goto((Path(site).resolve() / "book" / "live.html").as_uri(), timeout=WAIT)
        for piece, (button, ready) in READY.items():
            box = page.locator(f"#live-{piece}")
            box.locator("textarea").click()
            if button:
                box.locator("button", has_text=button).first.click()
            page.wait_for_selector(f"#live-{piece} {ready}", timeout=WAIT)
            page.evaluate("document.activeElement.blur()")
            picture = Image.open(io.BytesIO(box.screenshot())).convert("RGB")
            picture.quantize(32).save(HERE / f"still-{piece}.png", optimize=True)
            css += RULE.format(piece, f"{picture.width} / {picture.height}")
        browser.close()
    (HERE / "stills.css").write_text(css)


if __name__ == "__main__":
    main(sys.argv[1])
