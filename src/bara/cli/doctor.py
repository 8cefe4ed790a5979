"""`bara doctor`: what is here, and whether it computes what it should."""

from __future__ import annotations

from typing import Any

import typer


def doctor() -> None:
    """Say what is installed, and test draws and KL here; the exit code is 1 if a test fails."""
    import platform
    import time

    import torch
    from rich.console import Console

    from bara.doctor import packages, self_test
    from bara.machine import accelerator, bfloat16_speed, fast_bfloat16, quieten_libraries, versions

    quieten_libraries()
    console = Console()
    found = packages()
    speed = "fast" if fast_bfloat16() else "slow"
    facts = {
        "bara-peft": versions()["bara-peft"],
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "device": accelerator(),
        "bfloat16": f"{speed} here (a matrix product: {bfloat16_speed():.2g} x float32); "
        f"the quickstart uses {versions()['precision']}",
    }
    for name, fact in facts.items():
        console.print(f"{name:<10}", fact, highlight=False)
    _print_packages(console, found)
    start = time.perf_counter()
    checks = self_test("cuda" if torch.cuda.is_available() else "cpu")
    seconds = time.perf_counter() - start
    failed = [check for check in checks if not check.passed]
    for check in failed:
        console.print(
            f"[bold red]failed[/] {check.name}: {check.found:.6g}, and it has to be within "
            f"{check.tolerance:.2g} of {check.expected:.6g}",
            highlight=False,
        )
    console.print(
        f"self-test  {len(checks) - len(failed)} of {len(checks)} checks of draws and KL against "
        f"closed forms passed, in {seconds:.1f} s",
        highlight=False,
    )
    if failed:
        raise typer.Exit(1)
    console.print("Next:\n  bara quickstart --tiny", highlight=False)


def _print_packages(console: Any, found: dict[str, list[Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from bara.doctor import BESIDE_EXTRAS

    table = Table(padding=(0, 1, 0, 0), box=None)
    table.add_column("extra")
    table.add_column("packages")
    for extra, packages in found.items():
        names = Text(", ".join(f"{p.name} {p.version or 'missing'}" for p in packages))
        if off := [p.name + p.wanted for p in packages if not p.fits]:
            install = f"'bara-peft[{extra}]'" if extra else "bara-peft"
            if off == list(BESIDE_EXTRAS.get(extra, ())):
                install = f"--no-deps {off[0]}"
            names.append(f"\n{', '.join(off)}: pip install {install}", style="yellow")
        table.add_row(extra or "(always)", names)
    console.print(table)
