"""lowkernels.explain: the dispatcher's answer without a call."""

from __future__ import annotations

import pytest

import lowkernels
from lowkernels.testing import random_call


def test_says_who_and_why_without_running() -> None:
    call = random_call("mbconv", channels=6)
    before = lowkernels.dispatch.last_call()
    choice = lowkernels.explain(call.operator, *call.args)
    assert lowkernels.dispatch.last_call() is before
    assert choice.backend == "eager"
    assert "multiples of 4" in str(choice) or not any(name == "cpu" for name, _ in choice.rejected)
    assert lowkernels.explain(call.operator, *call.args, backend="eager").reason == "asked for by the backend argument"


def test_unknown_operators_and_bad_arguments_are_refused() -> None:
    with pytest.raises(lowkernels.InputError, match=r"operator: is 'convolve'; allowed are conv_act"):
        lowkernels.explain("convolve")
    call = random_call("gn_mlp")
    with pytest.raises(lowkernels.InputError, match="gn_mlp: argument x"):
        lowkernels.explain("gn_mlp", call.args[0][0], *call.args[1:])
