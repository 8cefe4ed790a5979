"""The tutorial runs as it stands, if on a tiny model; the API reference has every public name."""

import re
import shlex
import socket
from pathlib import Path

import pytest
import yaml

import bara
from bara.data import examples

DOCS = Path(__file__).parent.parent / "docs"
FEWER = 5  # times


def test_every_public_name_is_in_the_reference():
    pages = [path.read_text("utf-8") for path in (DOCS / "api").glob("*.md")]
    found = [name for page in pages for name in re.findall(r"^::: bara\.(\w+)$", page, re.M)]
    assert sorted(found) == sorted(bara.__all__)


def test_the_navigation_has_no_hole():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    site = yaml.load((DOCS.parent / "mkdocs.yml").read_text("utf-8"), Loader)

    def pages(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(child)

    listed = list(pages(site["nav"]))
    assert len(listed) == len(set(listed))
    missing = [page for page in listed if not (DOCS / page).is_file()]
    assert missing == []


def test_links_lead_to_headings_that_are_there():
    """mkdocs builds without a word where only the anchor is wrong."""

    def headings(path):
        text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
            yield re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")

    found, broken = 0, []
    for page in [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]:
        for path, anchor in re.findall(r"\]\(([^)\s:#]*)#([^)\s]+)\)", page.read_text("utf-8")):
            target = page.parent / path if path else page
            found += 1
            if target.suffix == ".md" and anchor not in headings(target):
                broken.append(f"{page.name}: {path}#{anchor}")
    assert found > 50
    assert broken == []


def test_the_tutorial_runs(tiny_model_dir, tmp_path, monkeypatch, run):
    """What it serves is asked what it says to ask."""
    pytest.importorskip("fastapi")
    import httpx

    from serving import running

    load, news = examples.load_sentiment, examples.load_news
    monkeypatch.setattr(
        examples,
        "load_sentiment",
        lambda num_train, num_validation, num_test: load(
            num_train // FEWER, num_test // FEWER, num_validation // FEWER
        ),
    )
    monkeypatch.setattr(examples, "load_news", lambda count: news(count // FEWER))
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "tutorial.md").read_text("utf-8")
    asked = re.search(r"curl localhost:8000(\S+) -H \"(.*?): (.*?)\" -d '(.*)'", page)
    assert asked is not None
    path, header, value, body = asked.groups()
    answers = []

    def served(app, listener, limits):
        with running(app) as url:
            answers.append(
                httpx.post(url + path, content=body, headers={header: value}, timeout=60)
            )

    monkeypatch.setattr("bara.serving.server.run", served)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    here = {"$MODEL": str(tiny_model_dir), "8000": port}
    names = {}
    commands = []
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            if program != "bara":
                continue
            arguments = [here.get(argument, argument) for argument in arguments]
            if arguments[0] == "train":
                arguments += ["--set", "training.max_steps=2"]
            commands.append(arguments[0])
            run(*arguments)
    told = "doctor train train evaluate evaluate predict ranks evaluate predict serve"
    assert commands == told.split()
    assert (tmp_path / "ranks" / "report.html").is_file()
    decided = (tmp_path / "decided.jsonl").read_text("utf-8").splitlines()
    assert len(decided) == 600 // FEWER
    assert all('"abstained": ' in line for line in decided)
    (answer,) = answers
    assert {"abstained", "epistemic"} <= answer.json()["predictions"][0].keys()


@pytest.mark.parametrize("name", ["CHANGELOG.md", "SECURITY.md", "CITATION.cff"])
def test_pages_of_the_project_are_the_files_themselves(name):
    assert any(f'--8<-- "{name}"' in path.read_text("utf-8") for path in DOCS.glob("*.md"))
