"""The README's pictures: those of one `bara quickstart`.

bara quickstart
python benchmarks/readme_pictures.py bara-quickstart
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what the quickstart wrote")
    folder = parser.parse_args().folder
    for name in ("reliability", "risk_coverage", "rank_layers", "rank_inputs"):
        shutil.copy(folder / f"{name}.png", ROOT / "docs/images")
    shutil.copy(folder / "results.json", ROOT / "benchmarks/results/quickstart.json")


if __name__ == "__main__":
    main()
