"""The console command as a user types it."""

import itertools
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from entropy_gpt.commands.main import app

from .forks import run_command


COMMAND = Path(sys.executable).with_name("entropy-gpt")
# Commands that end before anything is computed, and how.
WITHOUT_IMPORTS = {
    "--help": 0,
    "train --help": 0,
    "quickstart --steps 0": 2,
    "train no-such-recipe": 1,
    "train python-stdlib-small lerning_rate=1": 1,
    "train python-stdlib-small learning_rate": 1,
    "train python-stdlib-small learning_rate=-1": 1,
    "convert openai-community/gpt2 --to SM+ScFuFN --output x": 1,
    "evaluate ./nowhere": 1,
    "evaluate some/model --prompt text --head 2": 1,
}


def run(*arguments):
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quikstart"], "Did you mean 'quickstart'?"),
        (["quickstart", "--stps", "3"], "--steps"),
        (["quickstart", "--steps", "0"], "'--steps': Input should be greater than or equal to 1; it is 0 ("),
        (["quickstart", "--steps", "many"], "unable to parse string as an integer; it is many ("),
        (["quickstart", "--seed", "-1"], "'--seed'"),
        (["quickstart", "somewhere"], "somewhere"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(arguments, message):
    process = run_command(*arguments)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert message in line


def test_without_arguments_the_help_is_shown():
    process = run_command()
    assert process.returncode == 2
    assert "quickstart" in process.stdout + process.stderr
    assert "Traceback" not in process.stderr


def test_help_shows_an_example():
    process = run_command("quickstart", "--help")
    assert process.returncode == 0
    assert "Example: entropy-gpt quickstart --corpus" in process.stdout


def test_without_docstrings_the_command_starts():
    process = subprocess.run([sys.executable, "-OO", COMMAND, "train", "--help"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "--settings" in process.stdout


def list_commands(group=None, words=()):
    """The words of every command, also of those of subcommands."""
    group = group or get_command(app)
    for name, command in group.commands.items():
        yield (*words, name)
        if hasattr(command, "commands"):
            yield from list_commands(command, (*words, name))


@pytest.mark.parametrize("words", [(), *list_commands()], ids=" ".join)
def test_h_is_help(words):
    narrow = {"COLUMNS": "80"}
    short, long = (CliRunner(env=narrow).invoke(app, [*words, option]) for option in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0
    assert short.output == long.output
    assert "Usage" in short.output
    prose = [line.rstrip() for line in short.output.partition("╭")[0].splitlines()]
    for line, below in itertools.pairwise(prose):
        if line and below:
            assert len(f"{line} {below.split()[0]} ") > 80, "the terminal breaks lines, and not the source"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("entropy-gpt eval", "evaluate"), ("entropy-gpt train python-stdlib-s", "python-stdlib-small")],
)
def test_the_shell_completes_commands_and_recipes(typed, expected):
    variables = {"_ENTROPY_GPT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert CliRunner().invoke(app, [], env=variables, prog_name="entropy-gpt").output.split() == [expected]


def test_version():
    assert run("--version").stdout == f"entropy-gpt {version('entropy-gpt')}\n"


def test_help_and_what_is_refused_by_its_name_wait_for_no_imports():
    code = """
import sys
from entropy_gpt.commands.main import main

for line in sys.stdin:
    sys.argv = ["entropy-gpt", *line.split()]
    print(f"\\n{main()}", "torch" in sys.modules)
"""
    typed = "\n".join(WITHOUT_IMPORTS)
    process = subprocess.run([sys.executable, "-c", code], input=typed, capture_output=True, text=True)
    found = [line.split() for line in process.stdout.splitlines() if line.endswith(("True", "False"))]
    assert dict(zip(WITHOUT_IMPORTS, found, strict=True)) == {
        command: [str(status), "False"] for command, status in WITHOUT_IMPORTS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["evaluate", "plot", "report", "study --protocol", "export --onnx", "card", "private demo"]
)
def test_commands_that_other_tests_run_in_forks_start_by_themselves(command, tmp_path):
    process = run(*command.split(), tmp_path / "nowhere")
    assert process.returncode == 1, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("entropy-gpt: ")
    assert "nowhere" in line
