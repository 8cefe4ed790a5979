"""The queue of the server: what shares a pass, what is refused, what is lost by whom."""

import threading
import time

import pytest

pytest.importorskip("fastapi")

from bara.serving.batcher import Batcher, Job
from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.problems import Problem


class Work:
    """Runs jobs: its result is the payload. The first pass waits until it is let go."""

    def __init__(self, **limits):
        self.passes = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.metrics = Metrics()
        self.batcher = Batcher(Limits(**limits), self.metrics)
        self.batcher.start()

    def run(self, jobs):
        self.passes.append([job.payload for job in jobs])
        self.begun.set()
        assert self.go.wait(10)
        for job in jobs:
            if job.payload == "bad":
                raise ValueError("bad")
            job.finish(job.payload)

    def submit(self, payload, settings=(), rows=1, seconds=10.0):
        job = Job(self.run, settings, rows, payload, time.monotonic() + seconds)
        self.batcher.submit([job])
        return job

    def hold(self):
        """Makes the thread busy, so that what comes now waits together."""
        self.submit("first")
        assert self.begun.wait(10)


@pytest.fixture
def work(request):
    made = []

    def make(**limits):
        made.append(Work(**limits))
        made[-1].hold()
        return made[-1]

    yield make
    for one in made:
        one.go.set()
        one.batcher.close()


def test_what_waits_together_and_is_alike_shares_a_pass_in_order(work):
    one = work(rows=3)
    given = [("a", 1), ("b", 2), ("c", 1), ("d", 1), ("e", 1), ("f", 2)]
    jobs = [one.submit(name, (kind,)) for name, kind in given]
    one.go.set()
    assert [job.result.result(10) for job in jobs] == list("abcdef")
    assert one.passes == [["first"], ["a", "c", "d"], ["b", "f"], ["e"]]


def test_a_job_with_more_rows_than_a_pass_has_one_of_its_own(work):
    one = work(rows=3)
    jobs = [one.submit("large", rows=5), one.submit("small")]
    one.go.set()
    assert [job.result.result(10) for job in jobs] == ["large", "small"]
    assert one.passes[1:] == [["large"], ["small"]]


def test_a_full_queue_refuses_all_of_a_request(work):
    one = work(queue=2)
    kept = one.submit("kept")
    pair = [Job(one.run, (), 1, name, time.monotonic() + 10) for name in "ab"]
    with pytest.raises(Problem) as refused:
        one.batcher.submit(pair)
    assert refused.value.status_code == 503
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    assert one.metrics.registry.get_sample_value("bara_queue_requests") == 1
    one.submit("last")
    one.go.set()
    assert kept.result.result(10) == "kept"


def test_one_bad_job_does_not_spoil_the_others(work):
    one = work()
    jobs = [one.submit(name) for name in ("a", "bad", "c")]
    one.go.set()
    assert jobs[0].result.result(10) == "a"
    assert jobs[2].result.result(10) == "c"
    with pytest.raises(ValueError, match="bad"):
        jobs[1].result.result(10)
    assert one.passes[1:] == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]


def test_what_has_been_handed_on_in_part_is_not_tried_again(work):
    one = work()
    jobs = [one.submit(name) for name in ("a", "bad")]
    jobs[0].started = True
    one.go.set()
    with pytest.raises(ValueError, match="bad"):
        jobs[1].result.result(10)
    assert one.passes[1:] == [["a", "bad"]]
    assert jobs[0].result.result(10) == "a"  # it was finished before the other failed


def test_nobody_computes_what_nobody_waits_for(work):
    one = work()
    late, gone, wanted = one.submit("late", seconds=-1), one.submit("gone"), one.submit("wanted")
    gone.closed.set()
    one.go.set()
    assert wanted.result.result(10) == "wanted"
    assert one.passes[1:] == [["wanted"]]
    with pytest.raises(Problem) as error:
        late.result.result(10)
    assert error.value.status_code == 504


def test_closing_finishes_what_waits_and_takes_no_more(work):
    one = work()
    jobs = [one.submit(i, (i,)) for i in range(5)]
    closing = threading.Thread(target=one.batcher.close)
    closing.start()
    deadline = time.monotonic() + 10
    while not one.batcher._closing and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.raises(Problem, match="stopping"):
        one.submit("too late")
    one.go.set()
    closing.join(10)
    assert [job.result.result(0) for job in jobs] == list(range(5))
