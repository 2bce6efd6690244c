"""irann/live/engine.c -> irann/live/engine.wasm, by the compiler that the package ziglang carries:

python book/live/build.py

The built file is committed, because `irann export` needs it where no compiler is; a test compiles
the source anew and holds the two equal, byte for byte.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LIVE = Path(__file__).parents[2] / "irann" / "live"
OPTIONS = (
    *("-target", "wasm32-freestanding", "-mcpu=generic+simd128+bulk_memory"),
    *("-O3", "-fno-math-errno", "-Wall", "-Werror", "-s", "-fvisibility=hidden"),
    *("-Wl,--no-entry", "-Wl,--export-dynamic"),
)


def build(out: Path) -> None:
    command = [sys.executable, "-m", "ziglang", "cc", *OPTIONS, "-o", out, LIVE / "engine.c"]
    cache = os.path.join(tempfile.gettempdir(), "irann-zig")  # the first time takes the longest
    places = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    subprocess.run([str(word) for word in command], check=True, env=os.environ | places)
    out.chmod(0o644)


if __name__ == "__main__":
    build(LIVE / "engine.wasm")
    print(f"{(LIVE / 'engine.wasm').stat().st_size:,} bytes")
