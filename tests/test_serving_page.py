"""The page of `bara serve`: in a real browser, by keyboard, by what a screen reader is told."""

# ruff: noqa: E402 (what comes after importorskip needs the extra `serve`)

import re
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
sync_api = pytest.importorskip("playwright.sync_api")

import httpx

import bara
from bara.serving.app import create_app
from bara.serving.page import HEADERS, PAGE
from bara.serving.served import load_served
from language_models import words
from serving import running

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KEY = "0123456789abcdef"


# -- without a browser -----------------------------------------------------------------------------


class Elements(HTMLParser):
    """All elements with their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, *tags):
        return [attrs for tag, attrs in self.found if tag in tags]


def test_everything_to_fill_in_has_a_label():
    page = Elements()
    labels = {attrs["for"] for attrs in page.all("label")}
    fields = {attrs["id"] for attrs in page.all("input", "select", "textarea")}
    assert fields <= labels
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert [attrs for attrs in page.all("p") if attrs.get("role") == "status"]
    for attrs in page.all("section"):
        assert attrs["aria-labelledby"] in ids
    assert len(page.all("caption")) == len(page.all("table"))


def test_the_page_loads_nothing_and_its_policy_allows_nothing_else():
    page = Elements()
    for _, attrs in page.found:
        assert not {"src", "onclick", "style"} & set(attrs)
        assert attrs.get("href", "data:,") == "data:,"
    assert "http" not in re.sub(r"https?://www\.w3\.org\S*", "", PAGE)
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert "unsafe" not in policy


# -- with one --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(served_folders):
    return load_served([str(folder) for folder in served_folders.values()])


@pytest.fixture(scope="module")
def url(served):
    with running(create_app(served)) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (chromium or google-chrome)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page, opened; what it asks elsewhere or complains of fails the test."""
    with opened(browser, url) as page:
        yield page


@contextmanager
def opened(browser, url):
    page = browser.new_page()
    page.set_default_timeout(20_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else 0)
    page.on(
        "request",
        lambda request: (
            wrong.append(request.url) if urlsplit(request.url).hostname != "127.0.0.1" else 0
        ),
    )
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    page.close()
    assert wrong == []


def done(page):
    """Waits for the answer; what the status says."""
    sync_api.expect(page.get_by_role("button", name="Ask")).to_be_enabled(timeout=20_000)
    return page.get_by_role("status").inner_text()


def cells(page, body):
    return [
        [cell.inner_text() for cell in row.locator("th, td").all()]
        for row in page.locator(f"#{body} tr").all()
    ]


def test_a_text_is_classified_by_keyboard_alone(page, url):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "model"
    page.keyboard.press("Tab")
    page.keyboard.type("a good film")
    page.keyboard.press("Control+Enter")
    status = done(page)
    body = {"model": "reviews", "texts": ["a good film"], "num_draws": 8, "seed": 0}
    (record,) = httpx.post(f"{url}/v1/predict", json=body).json()["predictions"]
    shown = cells(page, "classes-body")
    assert {row[0]: float(row[1]) for row in shown} == {
        name: pytest.approx(value, abs=6e-4) for name, value in record["probabilities"].items()
    }
    assert shown[0][0] == record["prediction"]
    assert status.startswith(record["prediction"])
    parts = [float(row[1]) for row in cells(page, "parts-body")]
    told = [record[name] for name in ("total", "aleatoric", "epistemic")]
    assert parts == pytest.approx(told, rel=6e-3)
    ranks = httpx.post(f"{url}/v1/rank", json={"model": "reviews", "texts": body["texts"]}).json()
    assert cells(page, "rank-body") == [
        [layer["name"], f"{layer['rank']:.2f}", "2", ""] for layer in ranks["layers"]
    ]
    meter = page.get_by_role("meter", name=f"probability of {record['prediction']}")
    assert float(meter.get_attribute("value")) == pytest.approx(
        record["probabilities"][record["prediction"]], rel=1e-3
    )


def test_an_answer_streams_and_its_tokens_are_shaded(page, served):
    page.get_by_label("Model").select_option("words")
    page.get_by_label("Message").fill(words(4, 5))
    page.get_by_label("Longest answer, tokens").fill("7")
    page.get_by_label("Draws").fill("5")
    page.get_by_role("button", name="Ask").click()
    status = done(page)
    one = served[-1]
    (answer,) = bara.generate(
        one.model,
        one.tokenizer,
        [[{"role": "user", "content": words(4, 5)}]],
        num_draws=5,
        max_new_tokens=7,
        agreement=False,
    )
    output = page.locator("#text-answer")
    assert output.inner_text() == answer.text
    assert output.get_attribute("aria-busy") == "false"
    assert answer.text in status
    for name, shade in (("total", "total"), ("epistemic", "epistemic")):
        page.get_by_label("Shade by").select_option(shade)
        levels = [
            float(token.evaluate("t => t.style.getPropertyValue('--u')"))
            for token in page.locator(".token").all()
        ]
        values = getattr(answer, f"{name}_uncertainty").tolist()
        assert levels == pytest.approx([min(1, v / 3) for v in values], abs=2e-3)
    page.get_by_text("Tokens as a table").click()
    rows = cells(page, "tokens-body")
    pieces = [row[0] for row in rows if row[0] != "(nothing to show)"]
    assert "".join(pieces).split() == ["".join(answer.text.split())]  # a cell is shown stripped
    assert [float(row[3]) for row in rows] == pytest.approx(
        answer.epistemic_uncertainty.tolist(), abs=2e-3
    )
    assert page.locator("#rank-body tr").count() > 0


def test_pairs_and_numbers_have_their_fields(page):
    page.get_by_label("Model").select_option("pairs")
    page.get_by_label("Text", exact=True).fill("good film")
    page.get_by_label("Second text").fill("bad film")
    page.get_by_role("button", name="Ask").click()
    done(page)
    assert {row[0] for row in cells(page, "classes-body")} == {"a", "b", "c"}
    page.get_by_label("Model").select_option("stars")
    page.get_by_role("button", name="Ask").click()
    assert done(page).startswith("About ")
    assert [row[0] for row in cells(page, "classes-body")] == [
        "Mean",
        "Interval from",
        "Interval to",
    ]


def test_labels_words_and_answers_have_their_tables(browser, task_folders):
    """Every number of the answer is there, and the status says the prediction."""
    served = load_served([str(folder) for folder in task_folders.values()])
    with running(create_app(served)) as url, opened(browser, url) as page:

        def asked(model, text, **body):
            page.get_by_label("Model").select_option(model)
            page.locator("#text").fill(text)
            page.get_by_role("button", name="Ask").click()
            status = done(page)
            given = {"model": model, "num_draws": 8, "seed": 0} | body
            (record,) = httpx.post(f"{url}/v1/predict", json=given).json()["predictions"]
            assert page.locator("#rank-body tr").count() > 0
            return status, record, cells(page, "classes-body"), cells(page, "parts-body")

        def near(parts):
            return pytest.approx(
                [v for p in parts for v in (p["total"], p["aleatoric"], p["epistemic"])], rel=6e-3
            )

        def values(rows):
            return [float(value) for row in rows for value in row[1:]]

        status, record, shown, parts = asked("labels", "good film", texts=["good film"])
        probabilities = {name: label["probability"] for name, label in record["labels"].items()}
        assert {row[0]: float(row[1]) for row in shown} == pytest.approx(probabilities, abs=6e-4)
        assert [row[0] for row in parts] == [*probabilities, "All together"]
        assert values(parts) == near([*record["labels"].values(), record])
        assert status.startswith(", ".join(record["prediction"]) or "No label")

        tokens = ["a", "bad", "plot"]
        assert page.get_by_label("Words, with spaces between them").count() == 0
        status, record, shown, parts = asked("tags", " a  bad plot ", tokens=[tokens])
        assert page.get_by_label("Words, with spaces between them").count() == 1
        assert [row[:2] for row in shown] == [
            list(pair) for pair in zip(tokens, record["prediction"], strict=True)
        ]
        assert values(parts) == near(record["words"])
        assert status.startswith(" ".join(record["prediction"]))

        page.get_by_label("Model").select_option("answers")
        page.get_by_label("Context").fill("the film was good .")
        question = {"question": "the film is", "context": "the film was good ."}
        status, record, shown, parts = asked("answers", "the film is", questions=[question])
        assert [row[0] for row in shown] == [a["text"] or "(no answer)" for a in record["answers"]]
        assert [float(row[1]) for row in shown] == pytest.approx(
            [answer["probability"] for answer in record["answers"]], abs=6e-4
        )
        assert values(parts) == near([record])
        assert status.startswith(record["prediction"] or "No answer")


def test_errors_are_told_in_the_status(browser, served):
    with running(create_app(served[:1], api_key=KEY)) as url:
        page = browser.new_page()
        page.goto(url)
        status = page.get_by_role("status")
        sync_api.expect(status).to_contain_text("Authorization: Bearer KEY")
        page.get_by_label("Key", exact=True).fill(KEY)
        page.get_by_label("Key", exact=True).press("Tab")
        page.wait_for_selector("#model option", state="attached")
        page.get_by_label("Text", exact=True).fill("a good film")
        page.get_by_label("Draws").fill("65")
        page.get_by_role("button", name="Ask").click()
        sync_api.expect(status).to_contain_text("num_draws: at most 64 here")
        page.get_by_label("Draws").fill("2")
        page.get_by_role("button", name="Ask").click()
        sync_api.expect(page.locator("#rank")).to_be_visible()
        page.close()


def test_a_narrow_screen_and_a_dark_one_show_everything(browser, url):
    page = browser.new_page(viewport={"width": 320, "height": 700}, color_scheme="dark")
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    page.get_by_label("Text", exact=True).fill("a good film")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#rank:not([hidden])")
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert colours[0] != colours[1]
    page.close()
