"""Turns of clients at a server's engines: in order, with a bound, each with its place, and fair."""

import contextlib
import threading

import pytest

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties import turns as turns_module
from entropy_gpt.evaluation.private_inference.parties.turns import Turns
from tests.waiting import eventually


class Client:
    """A thread that wants a turn, keeps it until it is let go, and notes what it hears."""

    def __init__(self, turns: Turns, name: str):
        self.heard, self.error, self.has_turn, self.release = [], None, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(turns, name), daemon=True)
        self.thread.start()

    def _run(self, turns: Turns, name: str):
        try:
            with turns.turn(name, self.hear):
                self.has_turn.set()
                self.release.wait(10)
        except (PrivateInferenceError, ConnectionError) as error:
            self.error = str(error)

    def hear(self, before: int, seconds: int):
        self.heard.append(before)
        self.seconds = seconds

    def end(self):
        self.release.set()
        self.thread.join(10)


class Gone(Client):
    """One that hangs up when it is told to wait."""

    def hear(self, before: int, seconds: int):
        raise ConnectionError


def join(turns: Turns, *names: str) -> list[Client]:
    """Clients that come one after another."""
    clients = []
    for name in names:
        count = turns.active + turns.waiting
        clients.append(Client(turns, name))
        assert eventually(lambda count=count: turns.active + turns.waiting > count)
    return clients


def test_they_come_in_order_and_know_their_place():
    turns = Turns(workers=2, longest=5)
    clients = join(turns, *"abcde")
    assert eventually(lambda: clients[4].heard == [2])
    assert [client.has_turn.is_set() for client in clients] == [True, True, False, False, False]
    clients[1].end()
    assert clients[2].has_turn.wait(10)
    assert eventually(lambda: (clients[3].heard, clients[4].heard) == ([1, 0], [2, 1]))
    for client in clients:
        client.end()
    assert (turns.active, turns.waiting) == (0, 0)
    assert turns.wait_until_idle(0)


def test_a_full_line_is_refused():
    turns = Turns(workers=1, longest=1)
    first, second = join(turns, "a", "b")
    late = Client(turns, "c")
    late.thread.join(10)
    assert "busy with other clients, and 1 wait already" in late.error
    first.end()
    assert second.has_turn.wait(10)
    second.end()


def test_without_a_line_an_engine_that_is_free_is_taken():
    turns = Turns(workers=1, longest=0)
    (first,) = join(turns, "a")
    late = Client(turns, "b")
    late.thread.join(10)
    assert "busy" in late.error
    first.end()


def test_who_asks_often_keeps_nobody_else_away():
    turns = Turns(workers=1, longest=3)
    clients = join(turns, *"aaaa")
    other = Client(turns, "b")
    clients[3].thread.join(10)
    assert "asked too often at once" in clients[3].error
    for client in clients[:3]:
        client.end()
    assert other.has_turn.wait(10)
    other.end()


def test_who_has_fewest_engines_comes_first():
    turns = Turns(workers=2, longest=5)
    clients = join(turns, *"aaaab")
    assert eventually(lambda: clients[4].heard == [0])
    clients[0].end()
    assert clients[4].has_turn.wait(10)
    assert not clients[2].has_turn.is_set()
    for client in clients:
        client.end()
    assert (turns.active, turns.waiting) == (0, 0)


def test_an_engine_that_is_free_is_no_reason_to_refuse():
    """Those who wait have not taken it yet."""
    turns = Turns(workers=2, longest=1)
    turns._enter("a")
    turns._enter("b")
    turns._enter("c")
    with pytest.raises(PrivateInferenceError, match="busy"):
        turns._enter("d")


def test_who_has_waited_for_too_long_is_refused_with_its_place():
    turns = Turns(workers=1, longest=3, seconds=0.2)
    clients = join(turns, *"abc")
    for client in clients[1:]:
        client.thread.join(10)
    assert "no turn came in 0.2 s" in clients[1].error
    assert "clients before this one: 0. Try again later" in clients[1].error
    assert clients[2].error
    assert (turns.active, turns.waiting) == (1, 0)
    clients[0].end()


def test_who_waits_hears_for_how_long(monkeypatch):
    monkeypatch.setattr(turns_module, "ANNOUNCE_SECONDS", 0.05)
    turns = Turns(workers=1, longest=3, seconds=2)
    first, second = join(turns, "a", "b")
    assert eventually(lambda: second.heard and second.seconds == 1)
    first.end()
    assert second.has_turn.wait(10)
    assert second.error is None
    second.end()


def test_who_is_gone_leaves_the_line():
    turns = Turns(workers=1, longest=3)
    (first,) = join(turns, "a")
    Gone(turns, "b").thread.join(10)
    assert turns.waiting == 0
    first.end()


def test_at_the_end_those_who_wait_are_sent_away_and_the_others_end():
    turns = Turns(workers=1, longest=3)
    first, second = join(turns, "a", "b")
    turns.close()
    second.thread.join(10)
    assert "about to end" in second.error
    assert not turns.wait_until_idle(0)
    first.end()
    assert turns.wait_until_idle(0)
    with pytest.raises(PrivateInferenceError, match="about to end"), contextlib.ExitStack() as stack:
        stack.enter_context(turns.turn("c", lambda before, seconds: None))
