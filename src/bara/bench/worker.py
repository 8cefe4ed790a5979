"""A process that runs one cell: the cell comes on standard input, the row goes to standard output.

A process of its own for each cell makes its peak memory measurable, and keeps a cell that is
killed for memory from taking others along.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback


def main() -> None:
    """Read a cell, run it, write its row; an error's last line tells what was wrong."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not the row
    values = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from bara.bench.cell import run_cell
        from bara.bench.spec import Cell
        from bara.machine import quieten_libraries

        quieten_libraries()
        row = run_cell(Cell.from_dict(values))
    except Exception as error:
        traceback.print_exc()
        print(describe(error), file=sys.stderr)
        sys.exit(1)
    output.write(json.dumps(row))
    output.close()


def describe(error: BaseException) -> str:
    """An error in one line."""
    from bara.errors import BaraError, first_line

    name = "" if isinstance(error, BaraError) else f"{type(error).__name__}: "
    return name + first_line(error)


def _end_with_parent() -> None:
    sys.stdin.read()  # ends when the parent does
    os._exit(1)


if __name__ == "__main__":
    main()
