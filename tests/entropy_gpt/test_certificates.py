"""Certificates that `private certificates` makes: TLS of both sides takes them, and nothing is overwritten."""

import contextlib
import shlex
import stat
import threading

import pytest

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import Listener, TLSFiles, connect
from entropy_gpt.terminal.private_certificates import run
from entropy_gpt.workflows.certificates import make_certificates

from .forks import run_command


def files(folder, name: str) -> TLSFiles:
    return TLSFiles(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")


def meet(server: TLSFiles, client: TLSFiles, host: str) -> str:
    """Shakes hands at an address of the loopback; how the server knows the client."""
    listener, met = Listener("::1" if host == "::1" else "127.0.0.1", 0, server), []

    def accept():
        with contextlib.suppress(PrivateInferenceError):
            met.append(listener.welcome(listener.accept()))

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        channel = connect(host, listener.address[1], client)
        thread.join(10)
        channel.close()
        return met[0].peer
    finally:
        listener.close()
        thread.join(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "certificates"
    make_certificates(["localhost", "::1"], folder, clients=["ada", "grace"])
    return folder


def test_both_sides_take_them_under_each_name(folder):
    server = files(folder, "server")
    peers = [meet(server, files(folder, name), host) for name in ("ada", "grace") for host in ("localhost", "::1")]
    assert len(set(peers)) == 2


def test_another_name_or_the_other_sides_certificate_is_refused(folder):
    with pytest.raises(PrivateInferenceError, match="has to name the host that --connect names"):
        meet(files(folder, "server"), files(folder, "ada"), "127.0.0.1")
    with pytest.raises(PrivateInferenceError, match="for the other side only"):
        meet(files(folder, "grace"), files(folder, "ada"), "localhost")


def test_keys_are_for_their_owner_alone_and_nothing_is_overwritten(folder):
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == (0 if path.suffix == ".key" else 0o044)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"ca.pem is there already"):
        make_certificates(["localhost"], folder, clients=["new"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("names", "clients", "said"),
    [
        ([], ["a"], "give the name by which clients reach the server"),
        (["1.2.3.999"], ["a"], "neither a host's name nor an address"),
        (["example.1"], ["a"], "neither a host's name nor an address"),
        (["a b"], ["a"], "--name a b is neither a host's name nor an address"),
        (["http://example.org"], ["a"], "neither a host's name"),
        (["a"], ["../a"], "can't be the name of a client"),
        (["a"], ["server"], "can't be the name of a client"),
        (["a"], ["b", "b"], "two clients have the same name"),
    ],
)
def test_names_that_are_none(tmp_path, names, clients, said):
    with pytest.raises(UserError, match=said):
        make_certificates(names, tmp_path / "new", clients=clients)
    assert not (tmp_path / "new").exists()


def test_days_beyond_all_calendars(tmp_path):
    with pytest.raises(UserError, match=r"--days 9999999 is too many: 36,500 is the most"):
        make_certificates(["a"], tmp_path / "new", days=9_999_999)
    assert not (tmp_path / "new").exists()


def test_the_options_can_be_copied_into_a_shell(tmp_path, capsys):
    run(["a"], tmp_path / "two words", clients=["ada"], days=1)
    words = shlex.split(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ada: ")))
    assert words[2] == str(tmp_path / "two words" / "ada.pem")


def test_the_command_says_what_the_files_are_for(tmp_path):
    process = run_command("private", "certificates", "--name", "example.org", "-o", "made", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "client: --cert made/client.pem --key made/client.key --ca made/ca.pem" in process.stdout
    again = run_command("private", "certificates", "--name", "example.org", "-o", "made", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
