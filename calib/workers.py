"""Where trials run: in threads of this process, in processes of this machine, or on the workers of a Dask cluster.

A trial gets all that it needs, models as bytes of ONNX, and what it returns depends on nothing else. So results are the
same wherever trials run and however many at a time; docs/workers.md has the rest. All three are an
`concurrent.futures.Executor`, so that whoever has trials to run need not know which.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Self, TypeVar

import onnx
import onnx_ir as ir

from qcompile.core import model as models
from qcompile.core.contract import Track
from qcompile.core.errors import UsageError, WorkerError, first_line

T = TypeVar("T")
S = TypeVar("S")

#: How a cluster's address begins.
CLUSTER = "tcp://"
#: Tasks for each worker: more would send the model more often, fewer would let workers wait for the last one.
SHARES = 2
#: Seconds within which a cluster has to answer and to have a worker.
PATIENCE = 30.0

#: Runs one share of the trials: gets what all have in common, then a mapping with what is its own, and returns a result
#: for each of its names.
Task = Callable[..., Mapping[str, T]]


def abreast(task: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """Yield what a task makes of each item, in their order, several at a time in threads of this process.

    For what is short and releases the interpreter's lock, as NumPy and the runtime do. No item may depend on another.
    Items are taken as they are needed, since they may be large.
    """
    if threads == 1:
        yield from map(task, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending = deque[Future[T]]()
        for item in items:
            pending.append(pool.submit(task, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        yield from (each.result() for each in pending)


@dataclass(frozen=True)
class Travelling:
    """A model that is sent to another process as the bytes of its ONNX file."""

    model: ir.Model

    def __reduce__(self) -> tuple[Callable[[bytes], Travelling], tuple[bytes]]:
        return _arrived, (models.serialize(self.model),)


def _arrived(content: bytes) -> Travelling:
    return Travelling(ir.from_proto(onnx.ModelProto.FromString(content)))


@dataclass(frozen=True)
class _Team:
    """An executor, how many tasks it is given, None for as many as there are trials, and what raises if it is alone."""

    pool: Executor
    tasks: int | None = None
    check: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Workers:
    """Where trials run.

    Parameters
    ----------
    threads : int
        Of this process.
    where : str, optional
        In their place: a number of processes of this machine, or the address of a Dask cluster's scheduler.
    identity : callable
        Returns what workers have to have in common with this process: versions and sources. A function of a module.

    Raises
    ------
    UsageError
        If `where` is neither.
    """

    threads: int
    where: str | None = None
    identity: Callable[[], str] = str

    def __post_init__(self) -> None:
        if not (self.where is None or self.where.startswith(CLUSTER) or (self.where.isdecimal() and int(self.where))):
            fact = f"'{self.where}' is neither a number of processes nor {CLUSTER}HOST:PORT"
            raise UsageError("--workers", fact, "give 1 or more, or the address of a Dask scheduler")

    def for_model(self, model: ir.Model) -> Self | Workers:
        """Return the workers for trials of a model: it has to fit into one message, or nobody but us has it."""
        return self if models.initializer_bytes(model) <= models.INLINE_LIMIT else Workers(1)

    def each(
        self, task: Task[T], given: Sequence[Any], trials: Mapping[str, Any], track: Track[tuple[str, T]], what: str
    ) -> dict[str, T]:
        """Run trials.

        Parameters
        ----------
        task : callable
            A function of a module. Called with what is given and some of the trials; returns a result for each.
        given : sequence
            What travels with each task, which may not change it.
        trials : mapping of str to object
            By name, what a trial has of its own.
        track : callable
            Shows progress.
        what : str
            What it says.

        Returns
        -------
        dict
            Results by name, in the order of the trials.

        Raises
        ------
        WorkerError
            If workers cannot be had, or died twice over the same trials.
        """
        found = dict(track(self._done(task, given, trials), len(trials), what))
        return {name: found[name] for name in trials}

    def _done(self, task: Task[T], given: Sequence[Any], trials: Mapping[str, Any]) -> Iterator[tuple[str, T]]:
        left = dict(trials)
        for again in (False, True):
            try:
                with self._team() as team:
                    for results in _finished(team, task, given, left):
                        left = {name: own for name, own in left.items() if name not in results}
                        yield from results.items()
                return
            except BrokenExecutor as error:
                if again:
                    fact = "a process died, and another one over the same trials"
                    raise WorkerError(self._place, fact, "give fewer, or more memory") from error

    def _team(self) -> AbstractContextManager[_Team]:
        if self.where is None:
            return _threads(self.threads)
        return _cluster(self.where, self.identity) if self.where.startswith(CLUSTER) else _processes(int(self.where))

    @property
    def _place(self) -> str:
        return f"--workers {self.where}"


def _finished(team: _Team, task: Task[T], given: Sequence[Any], trials: Mapping[str, Any]) -> Iterator[Mapping[str, T]]:
    """Deal the trials out, so that each share has some of all parts of the graph; yield what comes back."""
    count = min(len(trials), team.tasks or len(trials))
    shares = [dict(list(trials.items())[start::count]) for start in range(count)]
    pending = {team.pool.submit(task, *given, share) for share in shares}
    try:
        while pending:
            done, pending = wait(pending, PATIENCE, FIRST_COMPLETED)
            for future in done:
                yield future.result()
            if not done:
                team.check()
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def _threads(count: int) -> Iterator[_Team]:
    with ThreadPoolExecutor(count) as pool:
        yield _Team(pool)


@contextmanager
def _processes(count: int) -> Iterator[_Team]:
    context = _Spawning()
    with ExitStack() as stack:
        # One pool for each: one that breaks as it starts a further process waits for that without end, or fails (3.11).
        pools = [stack.enter_context(ProcessPoolExecutor(1, context, _begin)) for _ in range(count)]
        try:
            yield _Team(_InTurn(pools), count * SHARES, context.require_all)
        except BaseException:
            context.end()
            raise


class _InTurn(Executor):
    """Deals tasks out to several executors, which start their processes and threads whole, whenever Ctrl-C comes.

    A pool that is interrupted as it starts its thread cannot be ended (3.11: it joins a thread that has not begun).
    """

    def __init__(self, pools: Sequence[Executor]) -> None:
        self._pools = cycle(pools)

    def submit(self, task: Callable[..., T], /, *given: Any, **named: Any) -> Future[T]:
        with _interrupted_later():
            return next(self._pools).submit(task, *given, **named)


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Keep Ctrl-C from this block, whichever thread hears it, and from the processes that it starts.

    They stay deaf to it until they are prepared: they would print a traceback.
    """
    heard: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    here = handler is not None and threading.current_thread() is threading.main_thread()
    if here:
        signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if here:
            signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


class _Spawning(SpawnContext):
    """Starts processes and remembers them, because pools wait for all that runs, whatever it was that went wrong.

    They are spawned: a fork would copy the locks of the runtime's threads, but not the threads that release them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *given: Any, **named: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        process = SpawnProcess(*given, **named)
        self.started.append(process)
        return process

    def require_all(self) -> None:
        if any(process.exitcode is not None for process in self.started):
            raise BrokenProcessPool("a process ended, and the pool did not notice")

    def end(self) -> None:
        for process in self.started:
            if process.pid is not None:
                process.kill()


def _begin() -> None:
    """Prepare a process: it ends in silence with the one that started it, whatever ends that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _cluster(address: str, identity: Callable[[], str]) -> Iterator[_Team]:
    place = f"--workers {address}"
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        raise WorkerError(place, "dask.distributed is not installed", "pip install 'qcompile[cluster]'") from error
    try:
        client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        fact = f"no scheduler answers ({first_line(error)})"
        raise WorkerError(place, fact, "check the address, or start one: dask scheduler") from error
    try:
        _require_workers(client, place, identity)
        tasks = sum(client.nthreads().values()) * SHARES
        # Dask would advise to leave the model on a worker; but then it would be lost with that worker.
        with importlib.import_module("dask").config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
            yield _Team(client.get_executor(), tasks, lambda: _require_any(client, place))
    except distributed.KilledWorker as error:
        # Dask has tried elsewhere by then, as often as it is set to.
        fact = f"workers died over the same trials ({first_line(error)})"
        raise WorkerError(place, fact, "give them more memory") from error
    except CancelledError as error:
        raise _gone(place) from error
    finally:
        with suppress(Exception):  # a scheduler that is gone is no reason to fail at saying goodbye
            client.close(timeout=PATIENCE)


def _gone(place: str) -> WorkerError:
    return WorkerError(place, "the scheduler is gone", "start it, and run this again")


def _require_any(client: Any, place: str) -> None:
    try:
        there = client.nthreads()
    except Exception as error:  # what it raises depends on how far it is with trying to get it back
        raise _gone(place) from error
    if not there:
        raise WorkerError(place, "the cluster has no workers left", "start some, and run this again")


def _require_workers(client: Any, place: str, identity: Callable[[], str]) -> None:
    """Require workers that compute what this process would."""
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
        found = client.run(identity)
    except TimeoutError as error:
        raise WorkerError(
            place, "the cluster has no workers", f"start some: dask worker {place.split()[-1]}"
        ) from error
    except Exception as error:
        fact = f"a worker cannot run qcompile ({first_line(error)})"
        raise WorkerError(place, fact, "install the same there as here") from error
    if others := sorted(worker for worker, theirs in found.items() if theirs != identity()):
        fact = f"worker {others[0]} has other versions of qcompile or of its libraries"
        raise WorkerError(place, fact, "install the same there as here")
