"""Trials come to the same wherever they run; who dies over them is replaced once, and then it is an error."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import worker_tasks

from qcompile import cache
from qcompile.calib import workers as module
from qcompile.calib.collect import collect
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.observers import Observer
from qcompile.calib.sensitivity import choose_observers
from qcompile.calib.weighing import weights_alone
from qcompile.calib.workers import Travelling, Workers, abreast
from qcompile.core import model as models
from qcompile.core.errors import ModelError, UsageError, WorkerError

NUMBERS = {name: number for number, name in enumerate("fedcba")}
WHERE = pytest.mark.parametrize("where", [None, "1", "2"])


def track(items: Iterable, count: int, what: str) -> Iterable:
    return items


@pytest.mark.parametrize("where", ["0", "-1", "1.5", "two", "", "localhost:8786", "http://localhost"])
def test_neither_a_number_nor_an_address(where: str) -> None:
    with pytest.raises(UsageError, match=r"^--workers: .* neither"):
        Workers(1, where)


@WHERE
def test_results_have_the_order_of_the_trials(where: str | None) -> None:
    found = Workers(2, where).each(worker_tasks.times, (7,), NUMBERS, track, "testing")
    assert {name: number for name, (number, _) in found.items()} == {name: 7 * own for name, own in NUMBERS.items()}
    assert list(found) == list(NUMBERS)
    assert all((pid == os.getpid()) == (where is None) for _, pid in found.values())
    assert Workers(2, where).each(worker_tasks.times, (7,), {}, track, "testing") == {}


@WHERE
def test_progress_is_told_trial_by_trial(where: str | None) -> None:
    seen = []

    def telling(items: Iterable, count: int, what: str) -> Iterator:
        assert (count, what) == (6, "testing")
        for item in items:
            seen.append(item[0])
            yield item

    Workers(2, where).each(worker_tasks.times, (7,), NUMBERS, telling, "testing")
    assert sorted(seen) == sorted(NUMBERS)


@WHERE
def test_an_error_of_a_trial_is_an_error_here(where: str | None) -> None:
    with pytest.raises(ModelError, match=r"^model: does not load; export it again$"):
        Workers(2, where).each(worker_tasks.fails, (), NUMBERS, track, "testing")


def test_a_process_that_dies_is_replaced_and_its_trials_run_again(tmp_path: Path) -> None:
    found = Workers(1, "2").each(worker_tasks.dies_once, (tmp_path / "dead",), NUMBERS, track, "testing")
    assert found == NUMBERS and (tmp_path / "dead").exists()


def test_trials_that_two_processes_die_over_are_an_error() -> None:
    with pytest.raises(WorkerError, match=r"^--workers 2: a process died, .*; give fewer, or more memory$") as caught:
        Workers(1, "2").each(worker_tasks.dies, (), NUMBERS, track, "testing")
    assert caught.value.exit_code == 8


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and that nobody asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60.0
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(number: signal.Signals, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nimport worker_tasks\nfrom qcompile.calib.workers import Workers\n"
        "if __name__ == '__main__':\n    given, trials = (Path(sys.argv[1]),), {'a': 1, 'b': 2}\n"
        "    Workers(1, '2').each(worker_tasks.waits, given, trials, lambda items, count, what: items, '')\n"
    )
    (folder := tmp_path / "waiting").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, str(program), str(folder)], env=environment)
    try:
        assert wait_until(lambda: len(list(folder.iterdir())) == 2)
    finally:
        parent.send_signal(number)
        parent.wait()
    waiting = [int(path.name) for path in folder.iterdir()]
    assert wait_until(lambda: not any(map(alive, waiting)))


def test_a_model_travels_as_onnx(model_of: Callable[..., ir.Model]) -> None:
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model = model_of("(float[1,64] x) => (float[1,64] y) { y = MatMul (x, w) }", 21, w=weights)
    sent, content = pickle.dumps(Travelling(model)), models.serialize(model)
    assert content in sent and len(sent) < len(content) + 200
    assert models.serialize(pickle.loads(sent).model) == content


def test_a_model_beyond_one_message_stays_here(
    model_of: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("(float[1,4] x) => (float[1,4] y) { y = Add (x, w) }", 21, w=np.ones(4, np.float32))
    elsewhere = Workers(4, "2")
    assert elsewhere.for_model(model) is elsewhere
    monkeypatch.setattr(models, "INLINE_LIMIT", 15)
    assert elsewhere.for_model(model) == Workers(1)


TEXT = """(float[1,32] x) => (float[1,32] y, float[1,32] z) {
    [one] a = MatMul (x, u) b = Relu (a) [two] c = MatMul (b, v) d = Sigmoid (c) [three] y = MatMul (d, w)
    z = Add (c, x)
}"""


@pytest.fixture
def measured(model_of: Callable[..., ir.Model]) -> Callable[[Workers], tuple[object, object]]:
    """Measure what weights lose, and choose observers."""
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=(32, 32)).astype(np.float32) for name in "uvw"}
    model = model_of(TEXT, 21, **arrays)
    rounded = model_of(TEXT, 21, **{name: np.round(array, 1) for name, array in arrays.items()})
    samples = [{"x": generator.standard_t(2, size=(1, 32)).astype(np.float32)} for _ in range(24)]
    data = Dataset("test", lambda: iter(samples), input_specs(model))
    statistics = collect(model, ["x", "b", "c", "d"], data, track)

    def measure(workers: Workers) -> tuple[object, object]:
        losses = weights_alone(model, rounded, {"one": ["u"], "two": ["v"], "three": ["w"]}, data, track, workers)
        assert len(losses) == 3 and all(loss > 0.0 for loss in losses.values())
        among = tuple(Observer)
        choice = choose_observers(model, rounded, statistics, {}, among, "uint8", data, track, workers, {"c": 0.0})
        assert len(choice.alone) == 4
        return losses, choice

    return measure


def test_what_is_measured_does_not_depend_on_where(measured: Callable[[Workers], tuple[object, object]]) -> None:
    found = [measured(workers) for workers in (Workers(1), Workers(3), Workers(1, "1"), Workers(1, "3"))]
    assert found[1:] == found[:-1]


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """Start a cluster of as many processes as the test asks for, and return its address."""
    pytest.importorskip("distributed")
    import dask
    from distributed import LocalCluster

    count = getattr(request, "param", 2)
    options = {"n_workers": count, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), LocalCluster(**options) as local:
        yield local.scheduler_address


def test_a_cluster_measures_the_same(cluster: str, measured: Callable[[Workers], tuple[object, object]]) -> None:
    assert measured(Workers(1, cluster, cache.identity)) == measured(Workers(1))


def test_a_clusters_workers_do_the_trials_and_their_errors_are_errors_here(cluster: str) -> None:
    found = Workers(1, cluster).each(worker_tasks.times, (7,), NUMBERS, track, "testing")
    assert [number for number, _ in found.values()] == [7 * own for own in NUMBERS.values()]
    assert os.getpid() not in (pids := {pid for _, pid in found.values()}) and len(pids) == 2
    with pytest.raises(ModelError, match=r"^model: does not load; export it again$"):
        Workers(1, cluster).each(worker_tasks.fails, (), NUMBERS, track, "testing")


def test_what_a_cluster_is_given_may_be_large(cluster: str) -> None:
    found = Workers(1, cluster).each(worker_tasks.counts, (bytes(24 << 20),), NUMBERS, track, "testing")
    assert found == dict.fromkeys(NUMBERS, 24 << 20)


def test_a_clusters_worker_that_dies_is_replaced(cluster: str, tmp_path: Path) -> None:
    found = Workers(1, cluster).each(worker_tasks.dies_once, (tmp_path / "dead",), NUMBERS, track, "testing")
    assert found == NUMBERS and (tmp_path / "dead").exists()


def test_trials_that_a_clusters_workers_die_over_are_an_error(cluster: str) -> None:
    with pytest.raises(WorkerError, match=r"^--workers tcp://.*: workers died over the same trials"):
        Workers(1, cluster).each(worker_tasks.dies, (), NUMBERS, track, "testing")


def test_a_cluster_of_other_versions_is_refused(cluster: str) -> None:
    with pytest.raises(WorkerError, match=r"^--workers tcp://.*: worker tcp://.* has other versions of qcompile"):
        Workers(1, cluster, worker_tasks.somebody).each(worker_tasks.times, (7,), NUMBERS, track, "testing")


@pytest.mark.parametrize("cluster", [0], indirect=True)
def test_a_cluster_without_workers_is_an_error(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    with pytest.raises(WorkerError, match=r"^--workers (tcp://.*): the cluster has no workers; .*: dask worker \1$"):
        Workers(1, cluster).each(worker_tasks.times, (7,), NUMBERS, track, "testing")


@pytest.mark.parametrize("whole", [False, True])
def test_a_cluster_that_goes_away_is_an_error(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(module, "PATIENCE", 2.0)
    local = distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)

    def end() -> None:
        wait_until(lambda: any(tmp_path.iterdir()))
        local.close() if whole else local.scale(0)

    (ending := threading.Thread(target=end)).start()
    # A cluster that is closed loses its workers before it loses its scheduler: either may be seen.
    with pytest.raises(
        WorkerError, match=r"^--workers tcp://.*: the (cluster has no workers left|scheduler is gone); "
    ):
        Workers(1, local.scheduler_address).each(worker_tasks.waits, (tmp_path,), NUMBERS, track, "testing")
    ending.join()
    local.close()


def test_a_cluster_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    with pytest.raises(WorkerError, match=r"^--workers tcp://127\.0\.0\.1:9: no scheduler answers"):
        Workers(1, "tcp://127.0.0.1:9").each(worker_tasks.times, (7,), NUMBERS, track, "testing")


def test_without_dask_a_cluster_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(WorkerError, match=r"not installed; pip install 'qcompile\[cluster\]'$"):
        Workers(1, "tcp://127.0.0.1:9").each(worker_tasks.times, (7,), NUMBERS, track, "testing")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_is_done_abreast_comes_in_order(threads: int) -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0.0)
        return -number

    assert list(abreast(slow_at_first, range(20), threads)) == [-number for number in range(20)]


def test_items_are_taken_as_they_are_needed() -> None:
    """What comes next may be large: no more is held than threads work on, and what waits to be fetched."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = abreast(abs, items(), 2)
    assert next(results) == 0
    assert len(taken) == 3


def test_what_a_thread_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(abreast(lambda number: 1 / number, [2, 1, 0], 2))
