"""The order of the packages, read from the sources: imports run one way, and files stay small."""

import ast
import re
from pathlib import Path

import bara

ROOT = Path(bara.__file__).parent
ORDER = (
    *("errors", "schema", "files", "machine", "draws", "data", "cards", "prediction", "posteriors"),
    *("language", "evaluation", "adapter", "models", "training", "ranks", "certificates"),
    *("methods", "export", "reports", "finetuning", "serving", "__init__", "doctor"),
    *("quickstart", "lm_eval"),
    *("bench", "cli"),
    "__main__",
)
"""A package imports only those before it; docs/architecture.md says what each is for."""
MOST_LINES = 400


def module_name(path):
    """`bara.posteriors.bara` of its file."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path):
    """Modules of bara that a file imports anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "bara":
                found.add(name if name in FILES else name.rpartition(".")[0])
    return found - {module_name(path)}


GRAPH = {name: imported(path) for name, path in FILES.items()}


def package(module):
    """What the order calls it: the part after `bara`."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_package_has_its_place():
    assert {package(module) for module in FILES} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


def test_imports_run_one_way():
    place = {name: number for number, name in enumerate(ORDER)}
    wrong = [
        f"{FILES[module].relative_to(ROOT)} imports {FILES[other].relative_to(ROOT)}"
        for module, others in GRAPH.items()
        for other in sorted(others)
        if place[package(other)] > place[package(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_in_a_circle():
    """Depth-first: an import of a file that is still open closes a circle."""
    done = set()

    def visit(module, trail):
        assert module not in trail, " imports ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for other in sorted(GRAPH[module]):
            visit(other, [*trail, module])
        done.add(module)

    for module in GRAPH:
        visit(module, [])


def test_a_package_hands_names_on_and_does_nothing_else():
    allowed = (ast.ImportFrom, ast.Import, ast.Expr, ast.Assign)
    for path in ROOT.rglob("*/__init__.py"):
        nodes = ast.parse(path.read_text("utf-8")).body
        others = [ast.unparse(node) for node in nodes if not isinstance(node, allowed)]
        calls = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Call)]
        assert not others, f"{path}: {others}"
        assert not calls, f"{path}: calls something"


def test_no_file_is_long():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in FILES.values()}
    assert {path: n for path, n in lengths.items() if n > MOST_LINES} == {}


def test_the_page_names_the_packages_in_this_order():
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+)/?`", " ".join(rows))
    assert tuple(named) == ORDER
