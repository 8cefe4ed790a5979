"""The application on Ray Serve: two replicas on a local cluster, one of them killed."""

# ruff: noqa: E402 (what comes after importorskip needs the extra `serve`)

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

import httpx

import bara
from bara.data.text_task import encode_texts
from bara.serving.deployment import deployment
from bara.serving.served import load_served
from serving import TEXTS

if not os.environ.get("CI"):
    pytest.skip("a cluster takes half a minute: set CI=1", allow_module_level=True)

CLIENTS = 3
PORT = 8792


@pytest.fixture
def url(served_folders):
    source = str(Path(bara.__file__).parent.parent)
    environment = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": environment},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(deployment([served_folders["reviews"]], num_replicas=2), name="bara")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas():
    """The actors of the deployment."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor for actor in actors if "REPLICA" in actor["name"] and "bara" in actor["name"]]


def test_a_replica_is_killed_and_only_what_it_had_is_lost(url, served_folders):
    one = load_served([str(served_folders["reviews"])])[0]
    columns = encode_texts([TEXTS], one.tokenizer, one.task)
    rows = [dict(zip(columns, v, strict=True)) for v in zip(*columns.values(), strict=True)]
    expected = bara.predict(one.model, rows, num_draws=3, progress=False).probs[:, 1].tolist()
    killed, end = threading.Event(), time.monotonic() + 120

    def client(_):
        """Asks until it has asked for a while after the killing; what came, in order."""
        outcomes, after = [], 0
        while after < 20 and time.monotonic() < end:
            after += killed.is_set()
            try:
                answer = httpx.post(
                    f"{url}/v1/predict", json={"texts": TEXTS, "num_draws": 3}, timeout=30
                )
            except httpx.TransportError:
                outcomes.append("broken")
                continue
            if answer.status_code != 200:
                outcomes.append(answer.status_code)
                continue
            found = [p["probabilities"]["yes"] for p in answer.json()["predictions"]]
            outcomes.append("right" if found == pytest.approx(expected, abs=1e-4) else "wrong")
        return outcomes

    assert len(replicas()) == 2
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = pool.map(client, range(CLIENTS))
        time.sleep(1)
        victim = replicas()[0]
        ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
        killed.set()
        outcomes = list(running)
    for one_client in outcomes:
        assert "wrong" not in one_client
        assert sum(outcome != "right" for outcome in one_client) <= 1  # it was in flight
        assert one_client[-10:] == ["right"] * 10
    while len(replicas()) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    assert len(replicas()) == 2  # another one has taken its place
