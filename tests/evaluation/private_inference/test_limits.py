"""What a client may ask for, and for how long it may hold an engine."""

import contextlib
import json
import threading
import time
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import pytest
import trustme

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties import limits
from entropy_gpt.evaluation.private_inference.parties import server as server_module
from entropy_gpt.evaluation.private_inference.parties.channel import TURN_OVER, RefusalError, connect
from entropy_gpt.evaluation.private_inference.parties.job import Request
from entropy_gpt.evaluation.private_inference.parties.limits import DAY_SECONDS, Accounts, Limits, Use
from entropy_gpt.evaluation.private_inference.parties.party_process import PartyProcess
from entropy_gpt.evaluation.private_inference.parties.session import Events
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION
from entropy_gpt.evaluation.private_inference.program.steps import Span
from tests.waiting import eventually

from .attacking import WITHOUT_WAITING, channels, listening
from .test_channel import tls_files


FEW = Limits(answers=8, requests=3, positions=10, seconds=100)


class TestLimits:
    def test_requests_positions_and_seconds_are_counted_for_each_client(self):
        accounts = Accounts(FEW)
        use, left = accounts.open("one", 8)
        assert left == FEW
        with pytest.raises(PrivateInferenceError, match=r"2 of 10 positions a day left here, and asks for 3 \(--max"):
            accounts.open("one", 3)
        use.seconds = 99.7
        with pytest.raises(PrivateInferenceError, match="0 of 100 seconds a day left"):
            accounts.open("one", 1)
        use.seconds, use.positions = 3, 1
        accounts.open("one", 1)
        accounts.open("one", 1)
        with pytest.raises(PrivateInferenceError, match="0 of 3 requests a day left"):
            accounts.open("one", 1)
        accounts.open("another", 8)

    def test_what_is_being_answered_counts_its_seconds(self, monkeypatch):
        accounts, now = Accounts(FEW), [1000.0]
        monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now[0]))
        accounts.open("one", 1)[0].running_since = now[0]
        now[0] += 60
        assert accounts.open("one", 1)[1].seconds == 40
        now[0] += 40
        with pytest.raises(PrivateInferenceError, match="0 of 100 seconds a day left"):
            accounts.open("one", 1)

    def test_one_request_has_a_limit_of_its_own(self):
        with pytest.raises(PrivateInferenceError, match=r"9 answers are asked for; 8 is the most here \(--max-new"):
            Accounts(FEW).open("one", 9)

    def test_drafts_that_are_too_many_are_named(self):
        with pytest.raises(PrivateInferenceError, match=r"9 answers are asked for, 3 of them for drafts \(--draft, "):
            Accounts(FEW).open("one", 9, 20, 3)

    def test_what_is_taken_for_drafts_is_given_back_if_no_engine_begins(self):
        with listening(limits=FEW) as server, channels() as (ours, _):
            message = {"length": 4, "new_tokens": 3, "answers": 1, "drafts": 2}
            with pytest.raises(OSError, match="no process"), contextlib.ExitStack() as taken:
                _, use, _ = server._read_request(ours, message, taken)
                assert use.positions == 8
                raise OSError("no process")
            assert server._accounts.open(ours.peer, 1)[1].positions == FEW.positions - 3

    def test_repeats_may_take_what_a_client_with_drafts_has_left(self):
        with listening(limits=Limits()) as server, channels() as (ours, _), contextlib.ExitStack() as taken:
            message = {"length": 4, "new_tokens": 3, "answers": 1, "drafts": 2}
            request, use, _ = server._read_request(ours, message, taken)
            assert (use.positions, request.most_positions, request.limit) == (9, 256, "--max-new-tokens")

    def test_the_time_of_tables_is_part_of_a_clients_time(self, monkeypatch):
        given = []

        def answer(request, note, seconds, take_another):
            given.append(seconds)
            return SimpleNamespace(steps=[])

        with listening() as server:
            monkeypatch.setattr(server, "_send_tables", lambda channel, who, seconds: time.sleep(0.2))
            session, use = SimpleNamespace(answer=answer), Use(0.0, 1)
            for wants in (None, "a channel"):
                server._answer(session, "-", Request(4, 1, 1), use, FEW, None, wants)
        without, after = given
        assert FEW.seconds - 0.1 < without <= FEW.seconds
        assert after <= FEW.seconds - 0.2

    def test_a_day_later_all_is_granted_again(self, monkeypatch):
        accounts, now = Accounts(FEW), [0.0]
        monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now[0]))
        accounts.open("one", 8)
        now[0] = DAY_SECONDS + 1.0
        assert accounts.open("one", 8)[1] == FEW

    def test_only_so_many_clients_are_remembered(self, monkeypatch):
        monkeypatch.setattr(limits, "MAX_CLIENTS", 2)
        accounts = Accounts(FEW)
        for name in ("one", "two", "one", "three"):
            accounts.open(name, 1)
        assert [*accounts._uses] == ["one", "three"]

    def test_a_client_that_has_used_its_limits_is_refused_in_one_line(self):
        with listening(limits=replace(FEW, positions=1)) as server:
            for _ in range(2):
                with contextlib.closing(connect(*server.address, None)) as channel:
                    channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
                    channel.receive(5, ("terms",))
                    channel.send({"kind": "request", "length": 4, "new_tokens": 2, "answers": 1})
                    with pytest.raises(PrivateInferenceError, match=r"the peer refuses: this client has 1 of 1 posit"):
                        channel.receive(5, ("accepted",))

    def test_an_engine_is_kept_at_its_clients_expense_until_another_wants_it(self, monkeypatch):
        monkeypatch.setattr(server_module, "KEPT_CHECK_SECONDS", 0.1)
        with listening() as server:
            session, use = SimpleNamespace(events=Events()), Use(0.0, 1)
            session.events.put({"event": "peer's request"})
            assert server._next_request(session, use) == {"event": "peer's request"}
            threading.Timer(0.15, server.turns._enter, ["another"]).start()
            with pytest.raises(PrivateInferenceError, match="no further prompt came in time: connect again"):
                server._next_request(session, use)
            assert 0.1 < use.kept_seconds < 5

    @pytest.mark.parametrize("why", ["another client waits", "the server ends"])
    def test_a_client_that_asks_at_once_has_no_further_turn(self, why):
        with listening() as server:
            session = SimpleNamespace(events=Events())
            session.events.put({"event": "peer's request"})
            if why == "another client waits":
                server.turns._enter("another")
            else:
                server.drain(0)
            with pytest.raises(PrivateInferenceError, match="the turn is over") as over:
                server._next_request(session, Use(0.0, 1))
            assert over.value.code == TURN_OVER

    @pytest.mark.parametrize("with_tls", [False, True])
    def test_lines_for_programs_name_by_what_limits_go(self, with_tls, tmp_path):
        authority, lines = trustme.CA(), []
        ours = theirs = None
        if with_tls:
            ours, theirs = (tls_files(tmp_path, name, authority, "localhost") for name in "ab")
        with listening(lines.append, ours, json_log=True) as server:
            with contextlib.closing(connect("localhost" if with_tls else "127.0.0.1", server.address[1], theirs)) as c:
                c.send({"kind": "hello", "version": 0})
                with pytest.raises(RefusalError):
                    c.receive(WITHOUT_WAITING, ("terms",))
                own = c.connection.getsockname()
            assert eventually(lambda: lines)
        said = json.loads(lines[0])
        assert said["address"] == f"{own[0]}:{own[1]}"
        assert len(said["client"]) == 16 if with_tls else said["client"] == own[0]
        assert datetime.fromisoformat(said["time"]).tzinfo is not None

    def test_a_client_hears_that_its_turn_is_over(self):
        with channels() as (ours, theirs):
            with pytest.raises(PrivateInferenceError), ours.telling("server"):
                raise PrivateInferenceError("the turn is over", TURN_OVER)
            with pytest.raises(RefusalError, match="the turn is over") as heard:
                theirs.receive(WITHOUT_WAITING, ("program",))
            theirs.send({"kind": "refusal", "reason": "x", "code": ["other"]})
            with pytest.raises(RefusalError) as other:
                ours.receive(WITHOUT_WAITING, ("program",))
        assert (heard.value.code, other.value.code) == (TURN_OVER, None)

    def test_repeats_count_against_what_a_request_may_have_answered(self):
        process = PartyProcess.__new__(PartyProcess)
        process.request, process.positions = Request(4, 2, 1, most_positions=2), 0
        process._count(Span(0, 4))
        process._count(Span(0, 4))
        with pytest.raises(PrivateInferenceError, match=r"would take 3 positions: 2 is the most here, with those of"):
            process._count(Span(0, 4))
