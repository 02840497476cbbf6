"""The recipes of containers, read without an engine: what they name is there, and their commands can be run."""

import shlex
import tomllib

import pytest
import yaml
from typer.main import get_command

from entropy_gpt.commands.main import app
from entropy_gpt.workflows.certificates import make_certificates
from tests.pages import ROOT


FOLDER = ROOT / "containers"
SIDES = {"server": 9000, "gateway": 8080}


@pytest.fixture(scope="module")
def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, with those of the stages that it begins with."""
    lines = (FOLDER / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            found[name] = stage = [*found.get(source, [("FROM", source)])]
        elif word and not word.startswith("#"):
            stage.append((word, rest))
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]


def values(stage: list[tuple[str, str]], word: str) -> list[str]:
    return [value for name, value in stage if name == word]


def entry_point(stage: list[tuple[str, str]]) -> list[str]:
    return yaml.safe_load(values(stage, "ENTRYPOINT")[-1])


def parse(words: list[str]) -> dict:
    """The options of a command of `entropy-gpt`, as typed."""
    program, group, name, *rest = words
    assert program == "entropy-gpt"
    command = get_command(app).commands[group].commands[name]
    return command.make_context(name, rest).params


def test_what_is_built_is_what_there_is(stages):
    assert {*SIDES} < {*stages}
    (copied,) = values(stages["packages"], "COPY")
    source = copied.split()[1]
    (run,) = values(stages["packages"], "RUN")
    words = shlex.split(run)
    constraints = {words[place + 1] for place, word in enumerate(words) if word == "--constraint"}
    assert constraints == {f"{source}/constraints.txt"}
    assert (ROOT / "constraints.txt").is_file()
    (extra,) = {word.partition("[")[2].rstrip("]") for word in words if word.startswith(f"{source}[")}
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("side", SIDES)
def test_it_runs_as_nobody_and_installs_nothing_as_such(stages, side):
    words = [word for word, _ in stages[side]]
    (user,) = values(stages[side], "USER")
    assert all(part.isdigit() and int(part) > 0 for part in user.split(":"))
    assert "RUN" not in words
    assert words.index("COPY") < words.index("USER")
    assert values(stages[side], "EXPOSE") == [str(SIDES[side])]


@pytest.mark.parametrize("side", SIDES)
def test_a_composed_side_is_a_command_with_files_that_are_mounted(stages, services, side, tmp_path):
    service = services[side]
    build = service["build"]
    context = FOLDER / build["context"]
    assert (context / build["dockerfile"]).samefile(FOLDER / "Containerfile")
    assert build["target"] == side
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    made = {path.name for path in make_certificates(["server"], tmp_path)} | {"token"}
    (folder,) = values(stages[side], "WORKDIR")
    mounted = {}
    for volume in service["volumes"]:
        source, target, mode = volume.split(":")
        assert mode == "ro"
        assert (FOLDER / source).is_dir() or (FOLDER / source).name in made
        mounted[target] = source
    command = [*entry_point(stages[side]), *service["command"]]
    given = {f"{folder}/{word}" for word in service["command"] if f"{folder}/{word}" in mounted}
    assert given == {*mounted}  # what is mounted is used, by its path from the working folder
    options = parse(command)
    if side == "server":
        assert options["listen"] == f"0.0.0.0:{SIDES[side]}"
    else:
        assert options["address"] == f"server:{SIDES['server']}"
        assert (options["host"], options["port"]) == ("0.0.0.0", SIDES[side])
        assert [port.split(":")[::2] for port in service["ports"]] == [["127.0.0.1", str(SIDES[side])]]


def test_keys_and_tokens_are_left_out_of_an_image():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {"**/*.key", "**/token", ".git"} <= {*ignored}
