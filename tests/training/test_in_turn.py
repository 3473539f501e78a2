"""Functions that run in turn: order, errors, and that nothing is left running."""

from __future__ import annotations

import pytest
import torch
from plain import own_threads

from hoptim.training.in_turn import InTurn


def test_two_functions_alternate_and_get_what_is_sent():
    seen, turns = [], {}

    def body(name):
        for number in range(2):
            sent = turns[name].pause((name, number))
            seen.append((name, number, sent))

    for name in "ab":
        turns[name] = InTurn(lambda name=name: body(name))
    given = [[turns[name].resume(sent) for name in "ab"] for sent in ("start", 1, 2)]
    assert given == [[("a", 0), ("b", 0)], [("a", 1), ("b", 1)], [None, None]]
    assert seen == [("a", 0, 1), ("b", 0, 1), ("a", 1, 2), ("b", 1, 2)]
    assert turns["a"].ended
    assert turns["b"].ended


def test_an_error_comes_out_where_it_was_resumed_with_its_own_traceback():
    def body():
        raise KeyError("mine")

    turn = InTurn(body)
    with pytest.raises(KeyError, match="mine") as caught:
        turn.resume()
    assert caught.traceback[-1].name == "body"
    assert turn.ended


def test_closing_runs_what_cleans_up_and_leaves_no_thread():
    before, cleaned = own_threads(), []

    def body():
        try:
            turn.pause(1)
        finally:
            cleaned.append(True)

    turn, idle = InTurn(body), InTurn(body)
    assert turn.resume() == 1
    assert own_threads() == before + 1
    for one in (turn, turn, idle):
        one.close()
    assert cleaned == [True]
    assert own_threads() == before


def test_what_torch_has_set_for_the_thread_is_there():
    def body():
        found.append((torch.get_default_device().type, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))

    found = []
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = InTurn(body)
    InTurn(body).resume()
    inside.resume()
    assert found == [("cpu", torch.bfloat16, False), ("meta", torch.bfloat16, True)]
