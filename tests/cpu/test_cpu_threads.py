"""Several Python threads, forks, and cores that others use too."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

import pytest
import torch

from lowkernels.ops import OPERATORS
from lowkernels.testing import Call, random_call

pytestmark = pytest.mark.usefixtures("native")


def run(call: Call) -> torch.Tensor:
    return OPERATORS[call.operator].overload(*call.args, None, None, "cpu")


def calls() -> list[Call]:
    return [random_call(operator, batch=1, channels=64, height=14, width=14) for operator in OPERATORS]


def test_python_threads_at_once() -> None:
    todo = calls()
    expected = [run(call) for call in todo]
    wrong: list[str] = []

    def work(first: int) -> None:
        for index in range(30):
            which = (first + index) % len(todo)
            if not torch.equal(run(todo[which]), expected[which]):
                wrong.append(todo[which].operator)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork() -> None:
    # Packed ahead: torch's own parallel operators, which packing uses, may hang in a forked child.
    todo = calls()
    packed = [OPERATORS[call.operator].pack(*OPERATORS[call.operator].weights(call.args), backend="cpu") for call in todo]

    def results() -> list[torch.Tensor]:
        pairs = zip(todo, packed, strict=True)
        return [OPERATORS[call.operator].overload(*call.args, weights.tensors, "cpu", "cpu") for call, weights in pairs]

    expected = results()
    child = os.fork()
    if child == 0:
        ok = all(torch.equal(result, right) for result, right in zip(results(), expected, strict=True))
        os._exit(0 if ok else 1)
    deadline = time.monotonic() + 60
    status = None
    while status is None and time.monotonic() < deadline:
        pid, code = os.waitpid(child, os.WNOHANG)
        status = code if pid else None
        time.sleep(0.01)
    if status is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == 0


def _spin(stop: object) -> None:
    while not stop.is_set():  # type: ignore[attr-defined]
        sum(range(10000))


def test_busy_cores_neither_hang_nor_change_results() -> None:
    todo = calls()
    expected = [run(call) for call in todo]
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    busy = [context.Process(target=_spin, args=(stop,), daemon=True) for _ in range(2)]
    threads = torch.get_num_threads()
    for process in busy:
        process.start()
    try:
        # More threads than cores as well: barriers then wait for threads that do not run.
        for count in (2, 5):
            torch.set_num_threads(count)
            end = time.monotonic() + 4
            while time.monotonic() < end:
                for call, result in zip(todo, expected, strict=True):
                    assert torch.equal(run(call), result)
    finally:
        torch.set_num_threads(threads)
        stop.set()
        for process in busy:
            process.join(30)
