"""What the site needs beyond MkDocs: formulas, and the pictures of the benchmarks.

A fenced block `math` holds LaTeX, which becomes MathML when the site is built: browsers draw that
themselves, so that no script has to be loaded. The pages link to pictures in `benchmarks/results`,
beside `docs`, as they do where the repository is read; the site has copies in `figures`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

log = get_plugin_logger(__name__)
FIGURES = re.compile(r"\]\(((?:\.\./)*)\.\./benchmarks/results/")


def formula(source: str, *_: Any, **__: Any) -> str:
    """One block, one formula."""
    return f'<div class="formula">{convert(source.strip(), display="block")}</div>'


def on_config(config: Any) -> Any:
    fence = {"name": "math", "class": "formula", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Any, config: Any) -> Any:
    results = Path(config.config_file_path).parent / "benchmarks" / "results"
    for path in sorted(results.rglob("*.png")):
        name = f"figures/{path.relative_to(results).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return FIGURES.sub(r"](\1figures/", markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    for address in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', output):
        log.warning(
            f"{page.file.src_uri} loads {address}: the site is to need nothing from elsewhere"
        )
    return output
