"""The picture of `bara serve`'s page in the docs.

    python benchmarks/serving_picture.py

Serves MiniLM on tweets and SmolLM2-135M-Instruct, asks each on the page in Chromium (through
Playwright), and writes docs/images/serve-classes.png and docs/images/serve-tokens.png. Neither
adapter is trained well: the pictures show the page.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from bara.machine import quieten_libraries
from bara.serving.app import create_app
from bara.serving.limits import Limits
from bara.serving.served import load_served
from serving_adapters import make

IMAGES = Path(__file__).parent.parent / "docs/images"
PORT = 8768


def ask(page: Page, model: str, field: str, text: str, heading: str, picture: str) -> None:
    """Asks one model, and takes what is up to the rank's first layers."""
    page.get_by_label("Model").select_option(model)
    page.get_by_label(field, exact=True).fill(text)
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("heading", name="Rank in use")).to_be_visible(timeout=600_000)
    expect(page.get_by_role("heading", name=heading)).to_be_visible()
    page.screenshot(path=IMAGES / picture, full_page=True, clip=page_top(page))


def page_top(page: Page) -> dict[str, float]:
    """The page down to the fourth layer."""
    row = page.locator("#rank-body tr").nth(3).bounding_box()
    assert row is not None
    return {"x": 0, "y": 0, "width": 900, "height": row["y"] + row["height"] + 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=Path, help="where the adapters are, or are made")
    arguments = parser.parse_args()
    quieten_libraries()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        root = arguments.adapters or Path(temporary)
        folders = [make(root / "tweets", "minilm", "bara"), make(root / "texts", "smollm2", "bara")]
        served = load_served([str(folder) for folder in folders])
        app = create_app(served, limits=Limits(seconds=600))
        server = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 900, "height": 700})
            page.goto(f"http://127.0.0.1:{PORT}")
            expect(page.get_by_role("status")).to_have_text("")
            ask(page, "tweets", "Text", "what a day!!", "Prediction", "serve-classes.png")
            page.get_by_label("Model").select_option("texts")
            page.get_by_label("Longest answer, tokens").fill("30")
            page.get_by_label("Draws").fill("4")
            question = "Why is the sky blue?"
            ask(page, "texts", "Message", question, "Answer", "serve-tokens.png")
            browser.close()
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
