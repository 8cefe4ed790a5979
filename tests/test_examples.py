"""Every example runs from end to end on the tiny models that come with the examples."""

import runpy
import shutil
from pathlib import Path

import datasets
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGE = EXAMPLES.parent / "docs" / "examples.md"
JOBS = {
    "classification": ("--model tiny/encoder --data tiny/reviews.jsonl", "accuracy"),
    "regression": ("--model tiny/encoder --data tiny/stars.jsonl --target stars", "coverage_90"),
    "multiple_choice": ("--model tiny/decoder --data tiny/questions.jsonl", "accuracy"),
    "chat_sft": ("--model tiny/decoder --data tiny/chats.jsonl", "agreement of the draws"),
    "seq2seq": ("--model tiny/seq2seq --data tiny/pairs.jsonl --modules q v", "agreement of the"),
    "vision": ("--model tiny/vision --data tiny/pictures", "accuracy"),
    "serving": ("--model tiny/encoder --data tiny/reviews.jsonl", " nats"),
}
NEEDED = {"chat_sft": "trl", "serving": "fastapi"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the tiny models and tables."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["tiny.py"])
        runpy.run_path(str(EXAMPLES / "tiny.py"), run_name="__main__")
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_a_script_runs(tiny, name, tmp_path, monkeypatch, capsys):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    arguments, printed = JOBS[name]
    monkeypatch.chdir(tiny)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    command = [f"{name}.py", *arguments.split(), "--epochs", "1"]
    monkeypatch.setattr("sys.argv", command)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert printed in capsys.readouterr().out


def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for file in ("tiny.py", "first_steps.ipynb"):
        shutil.copy(EXAMPLES / file, tmp_path)
    notebook = nbformat.read(tmp_path / "first_steps.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    printed = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert any("accuracy" in text for text in printed)
    assert any("factors" in text for text in printed)
    assert (tmp_path / "first-steps" / "adapter_config.json").is_file()


def test_scripts_are_short_documented_and_on_the_page():
    """The page and each script name the command that is run here."""
    scripts = {path.stem: path.read_text("utf-8") for path in EXAMPLES.glob("*.py")}
    elsewhere = {"tiny", "active_learning"}  # the latter runs in test_jobs_docs.py
    assert set(scripts) == {*JOBS, *elsewhere}
    page = PAGE.read_text("utf-8")
    assert "active_learning.py" in page
    assert "first_steps.ipynb" in page
    for name, (arguments, _) in JOBS.items():
        assert len(scripts[name].splitlines()) < 60, name
        command = f"python examples/{name}.py {arguments}\n"
        assert command in scripts[name]
        assert command in page
