"""`entropy-gpt private` as processes of its own: a demonstration, a server with its client, and both misused."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from entropy_gpt.commands.main import main
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.origin import hash_weights
from entropy_gpt.evaluation.private_inference.parties.channel import connect, parse_address
from entropy_gpt.evaluation.private_inference.parties.limits import Limits
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.records.results import load_results
from entropy_gpt.terminal import private as terminal
from entropy_gpt.terminal.private import print_answer, read_prompt
from entropy_gpt.training.tokenizer import train_tokenizer
from entropy_gpt.workflows.private_answer import PrivateAnswer
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .forks import run_command


COMMAND = Path(sys.executable).with_name("entropy-gpt")
PROMPT = "def main("
SIZES = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}


def run(*arguments, **options):
    command = [COMMAND, "private", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


def save_model(folder: Path, text: str, notation: str = "SM+ScFuFFN", **fields) -> Path:
    tokenizer = train_tokenizer([text], 300)
    torch.manual_seed(0)
    sizes = SIZES | {"n_layer": fields.get("n_layer", 1)}
    config = EntropyGPTConfig.from_notation(notation, vocab_size=len(tokenizer), **sizes)
    model = EntropyGPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= fields.get("factor", 5)
    model.config.activation_function = fields.get("activation", model.config.activation_function)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, text):
    source = "\n".join(path.read_text() for path in text.iterdir())
    return save_model(tmp_path_factory.mktemp("model"), source)


@pytest.fixture(scope="module")
def address(model):
    """Of a server that is running."""
    pytest.importorskip("spu")
    command = [COMMAND, "private", "serve", model, "--listen", "127.0.0.1:0", "--max-new-tokens", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline().strip()
        assert line.startswith("listening on ")
        yield line.removeprefix("listening on ")
        server.kill()


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable:
    """Runs a command in this process; returns its exit status, and what it printed and complained."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["entropy-gpt", "private", *map(str, arguments)])
        capsys.readouterr()
        return main(), *capsys.readouterr()

    return run


@pytest.fixture
def complaint(run_here) -> Callable:
    """The one line that a command leaves when it fails."""

    def run(*arguments) -> str:
        status, _, error = run_here(*arguments)
        assert status == 1
        (line,) = error.strip().splitlines()
        assert line.startswith("entropy-gpt: ")
        return line

    return run


def test_an_answer_can_not_drive_the_terminal(capsys):
    cost = InferenceCost("SM", 1, 1, 1, 1, 1, 1, PrivateSettings(), "", [], [], 0.0, {}, None, "")
    print_answer("\x1b[2Ja", PrivateAnswer("\x1b]0;owned\x07b\n\tc[red]", None, 0.0, cost))
    assert capsys.readouterr().out == "\n[2Ja]0;ownedb\n        c[red]\n"


def test_without_the_engine_it_says_what_to_install(model, complaint, monkeypatch):
    monkeypatch.setitem(sys.modules, "spu", None)
    assert "pip install 'entropy-gpt[private]'" in complaint("demo", model)


class TestMisuse:
    @pytest.fixture(autouse=True)
    def _engine(self):
        pytest.importorskip("spu")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--listen", "nowhere"], "'nowhere' is no address: write HOST:PORT"),
            (["--listen", "127.0.0.1:99999"], "is no address"),
            (["--listen", "0.0.0.0:0"], "without TLS only this machine's loopback"),
            (["--listen", "127.0.0.1:0", "--cert", "missing.pem"], "TLS needs all three of --cert, --key and --ca"),
            *(
                (["--listen", "0.0.0.0:0", "--insecure", *told], "would show weights or prompt to whoever listens")
                for told in (["--protocol", "semi2k"], ["--embedding", "client_table"])
            ),
        ],
    )
    def test_of_addresses_and_certificates(self, model, arguments, message, complaint):
        assert message in complaint("serve", model, *arguments)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--embedding", "public"], "--embedding public and --public-checkpoint MODEL belong together"),
            (["--public-checkpoint", "{other}"], "--embedding public and --public-checkpoint MODEL belong together"),
            (["--embedding", "public", "--public-checkpoint", "no/such/folder"], "There is no no/such/folder"),
            (["--embedding", "public", "--public-checkpoint", "{other}"], "is not that of other (1 of "),
        ],
    )
    def test_of_public_embeddings(self, model, options, message, complaint, tmp_path):
        other = load_language_model(model)
        with torch.no_grad():
            other.transformer.wpe.weight[-1, -1] += 1
        other.save_pretrained(tmp_path / "other")
        options = [option.format(other=tmp_path / "other") for option in options]
        assert message in complaint("serve", model, "--listen", "127.0.0.1:0", *options)

    def test_a_port_in_use(self, model, complaint):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            line = complaint("serve", model, "--listen", address)
        assert address in line
        assert "in use" in line

    def test_no_server_and_no_model(self, model, tmp_path, complaint):
        assert "no server at 127.0.0.1:1" in complaint("ask", PROMPT, "--connect", "127.0.0.1:1", "--tokenizer", model)
        complaint("demo", tmp_path)

    @pytest.mark.parametrize(
        "command", [["demo", "nowhere"], ["ask", PROMPT, "--connect", "127.0.0.1:1", "--tokenizer", "nowhere"]]
    )
    def test_a_network_that_is_none(self, command, complaint):
        line = complaint(*command, "--network", "LAN", "--network", "100Mbps")
        assert "network '100Mbps' is not known: give LAN (1Gbps,1ms)" in line

    def test_a_network_to_clients_that_is_none(self, model, complaint):
        assert "network '100Mbps'" in complaint("serve", model, "--listen", "127.0.0.1:0", "--network", "100Mbps")

    def test_an_activation_without_a_private_form(self, tmp_path, text, complaint):
        source = "\n".join(path.read_text() for path in text.iterdir())
        folder = save_model(tmp_path, source, "SM+LN+G", activation="silu")
        assert "activation_function='silu' has no private form" in complaint("demo", folder)

    def test_weights_out_of_range(self, tmp_path, text, complaint):
        source = "\n".join(path.read_text() for path in text.iterdir())
        folder = save_model(tmp_path, source, factor=1e5)
        assert "does not fit the ring" in complaint("serve", folder, "--listen", "127.0.0.1:0")


@pytest.mark.parametrize(("words", "network"), [([], "WAN"), (["--network", "50Mbps,80ms"], "50Mbps,80ms")])
def test_a_server_takes_forms_for_the_network_it_is_told(words, network, model, run_here, monkeypatch):
    pytest.importorskip("spu")
    served = []
    monkeypatch.setattr(terminal, "_serve_until_terminated", lambda server, _: served.append(server.offer.settings))
    status, _, error = run_here("serve", model, "--listen", "127.0.0.1:0", *words)
    assert status == 0, error
    assert [settings.network for settings in served] == [network]


class TestPrompts:
    @pytest.mark.parametrize("content", [b"def main(", b"def main(\n", b"def main(\r\n"])
    def test_they_come_from_a_file_or_from_standard_input(self, content, tmp_path, monkeypatch):
        path = tmp_path / "prompt.txt"
        path.write_bytes(content)
        assert read_prompt(None, path) == PROMPT
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert read_prompt("-", None) == PROMPT
        assert read_prompt(PROMPT, None) == PROMPT

    def test_a_prompt_is_kept_as_it_is_but_for_the_last_lines_end(self, tmp_path):
        (tmp_path / "prompt.txt").write_bytes(b" a\n\n")
        assert read_prompt(None, tmp_path / "prompt.txt") == " a\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give one prompt: as PROMPT, as - for standard input, or with --prompt-file"),
            (["text", "--prompt-file", "some.txt"], "give one prompt"),
            (["--prompt-file", "missing.txt"], "can't be read from missing.txt: No such file"),
            (["--prompt-file", "latin.txt"], "can't be read from latin.txt: it is no UTF-8"),
        ],
    )
    def test_none_or_two_or_a_broken_one_is_refused(self, arguments, message, complaint, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "latin.txt").write_bytes(b"\xe9")
        assert message in complaint("ask", *arguments, "--connect", "127.0.0.1:1", "--tokenizer", "nowhere")

    def test_the_help_says_what_a_command_line_shows(self, run_here):
        status, printed, _ = run_here("ask", "--help")
        assert status == 0
        assert "other users of the machine can see a command line" in " ".join(re.sub(r"[^\w ]", " ", printed).split())


@pytest.mark.slow
def test_a_line_that_nobody_reads_ends_nothing():
    code = (
        "import os; from entropy_gpt.terminal.private import _print_line\n"
        "reading, writing = os.pipe(); os.dup2(writing, 1); os.close(reading)\n"
        "for _ in range(3): _print_line('line')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.private
class TestTwoProcesses:
    @pytest.fixture(autouse=True)
    def _engine(self):
        pytest.importorskip("spu")

    def test_the_demonstration_agrees_and_records_its_cost(self, model, tmp_path):
        output, results = tmp_path / "cost.json", tmp_path / "results.json"
        options = ("--network", "300Mbps,20ms", "--network", "lan", "--results", results)
        environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "FORCE_COLOR": "1"}
        Path(environment["TMPDIR"]).mkdir()
        words = ("private", "demo", model, "--max-new-tokens", 2, "--output", output)
        result = run_command(*words, *options, env=environment)
        assert result.returncode == 0, result.stderr
        assert not list(Path(environment["TMPDIR"]).glob("entropy-gpt-*"))
        result.stdout = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", result.stdout)
        assert "in the clear, 2 of 2 tokens are the same" in result.stdout
        shown = [line.partition(": about ")[0] for line in result.stdout.splitlines() if ": about " in line]
        assert shown == ["on 300Mbps,20ms", "on LAN"]
        cost = InferenceCost.load(output)
        assert cost.total_bytes > 0
        assert cost.set_up_bytes > 0
        assert cost.network == "loopback, two processes"
        assert {step.operation for step in cost.steps} >= {"embedding", "exponential", "head"}
        (told,) = load_results(results)
        assert told.weights == hash_weights(load_language_model(model))
        assert [(each.total_bytes, each.answers, each.check.same) for each in told.costs] == [(cost.total_bytes, 2, 2)]
        assert told.costs[0].check.largest_error < 0.01

    @pytest.mark.parametrize("embedding", ["one_hot", "client_table", "public"])
    @pytest.mark.parametrize(
        ("answer", "said"), [("logits", "compute the head"), ("sampled", "it can compare logits"), ("token", None)]
    )
    def test_an_operator_hears_what_a_client_may_learn(self, answer, said, embedding, monkeypatch):
        lines = []
        settings = PrivateSettings(answer=answer, embedding=embedding)
        offer = SimpleNamespace(settings=settings, config=SimpleNamespace(n_embd=8))
        server = SimpleNamespace(
            offer=offer,
            address=("127.0.0.1", 9),
            limits=Limits(positions=16),
            serve_forever=lambda: None,
            close=lambda: None,
        )
        monkeypatch.setattr(terminal, "open_server", lambda *given, **options: server)
        monkeypatch.setattr(terminal, "list_absorbable_ffns", lambda config: [])
        monkeypatch.setattr(terminal, "_print_line", lines.append)
        options = {"drain_seconds": 1, "health_port": None, "health_host": "127.0.0.1", "json_log": False}
        options |= dict.fromkeys(("answers", "requests", "positions", "seconds"), 1)
        terminal.serve("model", "127.0.0.1:0", None, None, None, **options)
        warned = [line for line in lines if "16 positions a day" in line]
        assert len(warned) == (said is not None)
        assert all(said in line for line in warned)
        known = any("logits give the last hidden states" in line for line in lines)
        assert known == (answer == "logits" and embedding != "one_hot")

    @pytest.mark.slow
    def test_ffns_that_are_not_absorbed_are_told_once_the_server_listens(self, text, tmp_path):
        source = "\n".join(path.read_text() for path in text.iterdir())
        folder = save_model(tmp_path / "model", source, n_layer=4)
        model = load_language_model(folder)
        with torch.no_grad():
            for block in model.transformer.h[1:3]:  # of half of the residual sum next to nothing is left
                lost = torch.diag(torch.arange(SIZES["n_embd"]) % 2.0)
                scales = block.residual_scaling
                block.mlp.c_fused.weight.copy_(-0.99 * scales.ffn_alpha * scales.ffn_beta * lost)
        model.save_pretrained(folder)
        command = [COMMAND, "private", "serve", folder, "--listen", "127.0.0.1:0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                first = server.stdout.readline().strip()
                address = first.removeprefix("listening on ")
                result = run("ask", PROMPT, "--connect", address, "--tokenizer", folder, "--max-new-tokens", 1)
            finally:
                server.kill()
            rest = server.stdout.read()
        assert result.returncode == 0, result.stderr
        assert first == f"listening on {address}"
        assert "FFNs of layers 1, 2 can't be absorbed" in rest

    @pytest.mark.slow
    def test_what_was_prepared_is_used(self, model, tmp_path):
        command = [COMMAND, "private", "serve", model, "--listen", "127.0.0.1:0", "--prepared", tmp_path / "server"]
        command += ["--text", model / "config.json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                address = server.stdout.readline().strip().removeprefix("listening on ")
                shared = ("--connect", address, "--tokenizer", model, "--prepared", tmp_path / "client")
                refused = run("ask", PROMPT, *shared, "--require-prepared")
                made = run("prepare", *shared, "--tokens", 16, "--count", 2)
                asked = run("ask", PROMPT, *shared, "--require-prepared")
            finally:
                server.kill()
        assert "make one (entropy-gpt private prepare)" in refused.stderr
        assert made.returncode == 0, made.stderr
        assert asked.returncode == 0, asked.stderr
        assert [len([*(tmp_path / side).glob("*.half")]) for side in ("server", "client")] == [1, 1]

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
    def test_a_server_that_ends_leaves_neither_files_nor_processes(self, model, tmp_path, number):
        command = [COMMAND, "private", "serve", model, "--listen", "127.0.0.1:0", "--drain-seconds", "1"]
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
            address = parse_address(server.stdout.readline().strip().removeprefix("listening on "))
            with contextlib.closing(connect(*address, None)) as channel:
                channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
                channel.receive(30, ("terms",))
                channel.send({"kind": "request", "length": 4, "new_tokens": 1, "answers": 1})
                channel.receive(30, ("accepted",))
                channel.send(channel.receive(60, ("program",)))
                time.sleep(1)  # the engine has its weights, and waits for the client's
                engines = psutil.Process(server.pid).children(recursive=True)
                assert engines
                assert not list(tmp_path.iterdir())
                server.send_signal(number)
                assert server.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
        _, alive = psutil.wait_procs(engines, timeout=10)
        assert not alive
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_a_server_goes_on_when_nobody_reads_its_lines(self, model):
        command = [COMMAND, "private", "serve", model, "--listen", "127.0.0.1:0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            try:
                address = server.stdout.readline().strip().removeprefix("listening on ")
                server.stdout.close()
                result = run("ask", PROMPT, "--connect", address, "--tokenizer", model)
                assert result.returncode == 0, result.stderr
                assert server.poll() is None
            finally:
                server.terminate()
                assert "Traceback" not in server.stderr.read()

    @pytest.mark.slow
    def test_one_client_after_another(self, model, address, run_here):
        arguments = ("ask", PROMPT, "--connect", address, "--tokenizer", model)
        first = run(*arguments)
        status, answer, error = run_here(*arguments)
        assert (first.returncode, status) == (0, 0), first.stderr + error
        assert PROMPT in first.stdout
        assert PROMPT in answer

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("prompt", "options", "message"),
        [
            ("x " * 100, [], "tokens are not possible: this model has n_positions=32"),
            ("", [], "the prompt is empty"),
            (PROMPT, ["--protocol", "semi2k"], "the server offers the protocol cheetah, and semi2k is asked for"),
            (PROMPT, ["--max-new-tokens", "3"], "3 answers are asked for; 2 is the most here"),
        ],
    )
    def test_what_the_model_can_not_answer(self, model, address, prompt, options, message, complaint):
        assert message in complaint("ask", prompt, "--connect", address, "--tokenizer", model, *options)

    @pytest.mark.slow
    def test_another_tokenizer(self, address, tmp_path, complaint):
        other = save_model(tmp_path, "some other text, of which other tokens are made " * 50)
        line = complaint("ask", PROMPT, "--connect", address, "--tokenizer", other)
        assert "the tokenizer is not the server's" in line
