"""Coroutines in threads: order, errors, and that nothing is left running."""

from __future__ import annotations

import pytest
import torch
from plain import own_threads

from hoptim.training.coroutine import Coroutine


def test_two_functions_alternate_and_get_what_is_sent():
    seen, coroutines = [], {}

    def body(name):
        for number in range(2):
            sent = coroutines[name].pause((name, number))
            seen.append((name, number, sent))

    for name in "ab":
        coroutines[name] = Coroutine(lambda name=name: body(name))
    given = [[coroutines[name].resume(sent) for name in "ab"] for sent in ("start", 1, 2)]
    assert given == [[("a", 0), ("b", 0)], [("a", 1), ("b", 1)], [None, None]]
    assert seen == [("a", 0, 1), ("b", 0, 1), ("a", 1, 2), ("b", 1, 2)]
    assert coroutines["a"].is_done
    assert coroutines["b"].is_done


def test_an_error_comes_out_where_it_was_resumed_with_its_own_traceback():
    def body():
        raise KeyError("mine")

    coroutine = Coroutine(body)
    with pytest.raises(KeyError, match="mine") as caught:
        coroutine.resume()
    assert caught.traceback[-1].name == "body"
    assert coroutine.is_done


def test_closing_runs_what_cleans_up_and_leaves_no_thread():
    before, cleaned = own_threads(), []

    def body():
        try:
            coroutine.pause(1)
        finally:
            cleaned.append(True)

    coroutine, idle = Coroutine(body), Coroutine(body)
    assert coroutine.resume() == 1
    assert own_threads() == before + 1
    for one in (coroutine, coroutine, idle):
        one.close()
    assert cleaned == [True]
    assert own_threads() == before


def test_what_torch_has_set_for_the_thread_is_there():
    def body():
        found.append((torch.get_default_device().type, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))

    found = []
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Coroutine(body)
    Coroutine(body).resume()
    inside.resume()
    assert found == [("cpu", torch.bfloat16, False), ("meta", torch.bfloat16, True)]
