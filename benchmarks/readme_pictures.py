"""The README's pictures: those of one `bara quickstart`.

python benchmarks/readme_pictures.py
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from bara.cli.terminal import quieten_libraries
from bara.quickstart import run_quickstart

IMAGES = Path(__file__).parent.parent / "docs/images"


def main() -> None:
    quieten_libraries()
    IMAGES.mkdir(exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quickstart"
        run_quickstart(output)
        for name in ("reliability", "risk_coverage", "rank_layers", "rank_inputs"):
            shutil.copy(output / f"{name}.png", IMAGES)
        shutil.copy(output / "results.json", Path(__file__).parent / "results/quickstart.json")
    print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
