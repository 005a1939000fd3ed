"""A backend that must prove itself on a device is used after it did, and not if it fails."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from lowkernels import BackendError, dispatch, selfcheck
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call
from tests.ops.probe import NAME, Probe


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_right_backend_proves_itself_once(probe: Probe, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    monkeypatch.setattr(Probe, "SELF_CHECK", True)
    call = random_call(operator)
    OPERATORS[operator].overload(*call.args)
    proofs = len(probe.forwards)
    assert proofs == len(selfcheck._CASES[operator]) + 1
    assert dispatch.last_call()[0].backend == NAME
    OPERATORS[operator].overload(*random_call(operator, height=9).args)
    assert len(probe.forwards) == proofs + 1
    # Another dtype is another proof.
    OPERATORS[operator].overload(*random_call(operator, dtype=torch.float64).args)
    assert len(probe.forwards) == 2 * proofs + 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_backend_is_not_used(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, operator: str
) -> None:
    monkeypatch.setattr(Probe, "SELF_CHECK", True)
    probe.wrong_by = 1e-2
    args = random_call(operator).args
    with caplog.at_level(logging.WARNING, "lowkernels"):
        OPERATORS[operator].overload(*args)
    choice = dispatch.last_call()[0]
    assert choice.backend == "eager"
    assert "self-check on cpu gave wrong numbers" in dict(choice.rejected)[NAME]
    assert f"lowkernels.{operator}: backend 'probe' is not used" in caplog.text
    with pytest.raises(BackendError, match="self-check on cpu gave wrong numbers"):
        OPERATORS[operator].overload(*args, None, None, NAME)
    with pytest.raises(BackendError, match="self-check"):
        OPERATORS[operator].pack(*OPERATORS[operator].weights(args), backend=NAME)


def test_a_backend_that_breaks_is_not_used(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "SELF_CHECK", True)
    kernel = dispatch.kernel("mbconv", NAME)
    monkeypatch.setattr(type(kernel), "forward", lambda *args: 1 / 0)
    args = random_call("mbconv").args
    OPERATORS["mbconv"].overload(*args)
    choice = dispatch.last_call()[0]
    assert choice.rejected == ((NAME, "its self-check on cpu failed (ZeroDivisionError: division by zero)"),)


def test_an_interrupted_proof_proves_nothing(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "SELF_CHECK", True)
    args = random_call("conv_act").args
    with monkeypatch.context() as patch:

        def interrupted(*args: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(selfcheck, "failure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            OPERATORS["conv_act"].overload(*args)
    probe.wrong_by = 1e-2
    OPERATORS["conv_act"].overload(*args)
    assert dispatch.last_call()[0].backend == "eager"


def test_other_threads_wait_for_a_proof(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "SELF_CHECK", True)
    args = random_call("conv_act").args
    begun, finish = threading.Event(), threading.Event()

    def slow(*args: object) -> str:
        begun.set()
        assert finish.wait(60)
        return "a reason"

    monkeypatch.setattr(selfcheck, "failure", slow)
    served = []

    def call() -> None:
        OPERATORS["conv_act"].overload(*args)
        served.append(dispatch.last_call()[0].backend)

    threads = [threading.Thread(target=call) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    assert not served
    finish.set()
    for thread in threads:
        thread.join(60)
    assert served == ["eager", "eager"]


def test_proofs_do_not_depend_on_the_callers_context(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "SELF_CHECK", True)
    state = torch.random.get_rng_state()
    args = random_call("conv_act").args
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        OPERATORS["conv_act"].overload(*args)
    assert dispatch.last_call()[0].backend == NAME
    assert torch.equal(torch.random.get_rng_state(), state)
