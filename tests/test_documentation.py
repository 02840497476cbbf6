"""Runs every command and code block of the documentation, in a folder with the files that the pages name."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path

import datasets
import pytest
import torch
import trustme
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from entropy_gpt.commands.main import main
from tests.evaluation.task_files import write_task_data

from .hub_server import USER, HubServer
from .pages import BLOCKS, DOCS, PAGES, README, ROOT, Block


FIGURES = sorted((ROOT / "docs").glob("*.svg"))
LANGUAGES = ("bash", "python", "yaml")
COMMANDS = Path(sys.executable).parent
# Of the working copy that pages are read in: they are named relative to it.
LINKED = ("evaluation/lm_eval_tasks", "model_cards/models", "training/accelerate", ".pre-commit-config.yaml")
GPT2 = "openai-community/gpt2"
LISTENING = "listening on "
# What pages begin with that speak of a private server and its gateway, and where these listen.
SERVE = "entropy-gpt private serve model_cards/models/converted"
OPEN_GATEWAY = "entropy-gpt private gateway --connect 127.0.0.1:9000 --tokenizer model_cards/models/converted"
PRIVATE_SERVER, GATEWAY = "127.0.0.1:9000", "127.0.0.1:8080"
README_WORDS = 1200
TASKS = ("quickstart", "train", "convert", "evaluate", "private", "gateway", "publish", "study", "python")
# Pages whose blocks of Python are typed one after the other.
SESSIONS = ("docs/attention.md",)
BETWEEN_TWO = ("entropy-gpt private demo", "entropy-gpt private serve", "lm_eval run --model local-completions")

SHORT = "max_steps=2 save_steps=2 eval_steps=2 logging_steps=1 validation_tokens=1024 data_cache=cache use_cpu=true"
SMALL = f"{SHORT} dataset=my_texts n_layer=1 n_head=2 n_embd=32"
SHORT_SETTINGS = {name: yaml.safe_load(value) for name, value in (word.split("=") for word in SMALL.split())} | {
    "tokenizer_vocab_size": 300
}

# How a server takes a port that is free, and prompts as long as the pages have.
FREE_PLACE = "--listen 127.0.0.1:0 --max-positions 9999"
# Words that stand for something of the reader's own, or for long work, and their replacements.
REPLACED = {
    "MODEL": "path/to/folder",
    "DRAFT_MODEL": "path/to/folder",
    "DIR": "path/to/folder",
    "FOLDER": "task_data",
    "my-name/my-model": f"{USER}/my-model",
    "0.0.0.0:9000": "127.0.0.1:0",
    "HOST:9000": "ADDRESS",
    "local_blimp": "local_blimp_anaphor_gender_agreement",
    "max_steps=100": "max_steps=2",
    "max_steps=500": f"**{SHORT_SETTINGS}",
    'output="my_evaluation"': 'output="my_evaluation", max_tokens=2000, head_tokens=1024',
    "--max-new-tokens 3": "--max-new-tokens 1",
    '"emulated", "in_process", "two_party"': '"emulated"',
    "accelerate launch": "accelerate launch --num_processes 1",
    "bash .ci/run": "bash -n .ci/run",
    ".venv/bin/": f"{COMMANDS}/",
}
# What makes commands short, by their beginnings.
ADDED = {
    "entropy-gpt train python-stdlib-small": f"{SMALL} tokenizer_vocab_size=300 entropy_logging_steps=1",
    "entropy-gpt train my_recipe.yaml": SHORT,
    "accelerate launch": f"{SMALL} tokenizer=path/to/folder text_column=text validation_dataset= validation_split= "
    "per_device_train_batch_size=2 gradient_accumulation_steps=1 dataloader_num_workers=0 fp16=false",
    "entropy-gpt evaluate": "--max-tokens 2000 --head-tokens 1024",
    "entropy-gpt evaluate MODEL --tasks": "--limit 2",
    "lm_eval run": "--limit 2 --device cpu",
    # These take long, and have tests of their own.
    "entropy-gpt private benchmark": "--dry-run",
    "entropy-gpt study --only": "--dry-run",
    "entropy-gpt study --protocol": "--dry-run",
    "entropy-gpt doctor": "--help",
}
# What a command makes anew.
TAKEN_AWAY = {"entropy-gpt train python-stdlib-small": "runs", "entropy-gpt evaluate": "evaluation_output"}
# What is there when it has ended.
LEFT = {
    "entropy-gpt train python-stdlib-small  ": ["runs/python-stdlib-small/model/model.safetensors"],
    "entropy-gpt train python-stdlib-small notation": ["runs/mine/model/config.json", "runs/mine/training_log.jsonl"],
    "entropy-gpt train my_recipe.yaml": ["runs/my_recipe/adapter/adapter_config.json", "runs/my_recipe/model"],
    "accelerate launch": ["runs/codeparrot-128/model/model.safetensors"],
    "entropy-gpt plot": ["pictures/losses.png"],
    "entropy-gpt diagnose": ["attention/entropies.png", "attention/attention_1_0.png"],
    "entropy-gpt evaluate": ["evaluation_output/results.json"],
    "entropy-gpt report": ["report.html"],
    "entropy-gpt card": ["path/to/folder/README.md"],
    "entropy-gpt export": ["exported_model/model.onnx", "exported_model/export_report.json"],
    ".venv/bin/pre-commit install": [".git/hooks/pre-commit"],
}
# What code begins with that a command left, by what it reads.
MADE_BY = {"exported_model": "entropy-gpt export MODEL --onnx --cache"}
# What it says.
SAID = {
    "entropy-gpt train  ": ["python-stdlib-small", "codeparrot-128", "convert-gpt2-small"],
    "entropy-gpt convert": ["LayerNorms static", "healing, 1,000 steps", "Nothing was written"],
    "entropy-gpt evaluate": ["perplexity"],
    "entropy-gpt evaluate MODEL --tasks local_blimp,local_arc_easy": ["local_arc_easy"],
    "lm_eval run": ["local_lambada_openai"],
    "entropy-gpt doctor": ["--require", "Exit status"],
    "entropy-gpt private demo": ["def main(", "in the clear"],
    "entropy-gpt private serve MODEL": ["def main("],
    "entropy-gpt private serve model_cards": ["<title>Private model</title>"],
    "entropy-gpt private certificates": ["certificates/server.key", "--cert certificates/grace.pem"],
    "entropy-gpt private benchmark": ["to be measured", "SM+LN+G"],
    "entropy-gpt private cost": ["exponential", "EReg(SM(t)+"],
    "entropy-gpt export": ["Not linear in the graph: ", "Softmax"],
    "entropy-gpt push": ["modeling_entropy_gpt.py", "folded/model.safetensors", f"{USER}/my-model"],
}

INLINE = re.compile(r"`((?:\.venv/bin/)?(?:entropy-gpt|make|python -m) [^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(language: str):
    alone = [block for block in BLOCKS if block.language == language and block.page not in SESSIONS]
    return [pytest.param(block, id=block.name) for block in alone]


def commands():
    found = {command: block for block in BLOCKS if block.language == "bash" for command in block.commands}
    return [
        pytest.param(
            command,
            id=f"{block.name}: {without_comment(command)}".replace("\n", " & "),
            marks=[pytest.mark.private] if command.startswith(BETWEEN_TWO) else [],
        )
        for command, block in found.items()
    ]


def inline_commands():
    """Those that are named within a sentence, as far as they go."""
    found = {}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for command in INLINE.findall(" ".join(text.split())):
            found.setdefault(command, f"{page.relative_to(ROOT).as_posix()}: {command}")
    return [pytest.param(command, id=name) for command, name in found.items()]


def without_comment(command: str) -> str:
    return re.sub(r"\s+# .*", "", command)


def replace(text: str) -> str:
    for name, value in REPLACED.items():
        text = re.sub(_as_word(name), lambda _, value=value: value, text)
    return text


def _as_word(name: str) -> str:
    return rf"(?<![\w/-]){re.escape(name)}(?![\w-])" if name[-1].isalnum() else re.escape(name)


def entries(table: dict, command: str) -> list:
    return [value for beginning, value in table.items() if command.startswith(beginning)]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with everything that the pages speak of, tiny and real; each test has a copy."""
    folder = tmp_path_factory.mktemp("shelf")
    texts = folder / "my_texts"
    texts.mkdir()
    for path in sorted((ROOT / "modeling_entropy_gpt").glob("*.py")):
        (texts / f"{path.stem}.txt").write_bytes(path.read_bytes())
    shutil.copytree(texts, folder / "training_texts")
    for name in LINKED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    write_task_data(folder / "task_data")
    for block in BLOCKS:
        if block.language == "yaml":
            (folder / recipe_name(block)).write_text(block.text, encoding="utf-8")

    # Two models, of which one comes out of a run with its log and its results.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ADDED["entropy-gpt train python-stdlib-small"]
        patch.setattr(sys, "argv", ["entropy-gpt", "train", "python-stdlib-small", *words.split()])
        assert main() == 0
    run = folder / "runs" / "python-stdlib-small"
    shutil.copytree(run, folder / "runs" / "mine")
    for place in ("path/to/folder", "runs/ereg-smt-scfuffn/model"):
        shutil.copytree(run / "model", folder / place)
    (folder / "evaluation_output").mkdir()
    shutil.copy(run / "model" / "results.json", folder / "evaluation_output")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    torch.manual_seed(0)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **special))
    for place in ("gpt2", "runs/sm-ln-g/model"):
        model.save_pretrained(folder / place)
        tokenizer.save_pretrained(folder / place)

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for side in ("server", "client"):
        certificate = authority.issue_cert("127.0.0.1")
        certificate.cert_chain_pems[0].write_to_path(folder / f"{side}.pem")
        certificate.private_key_pem.write_to_path(folder / f"{side}.key")
    return folder


def recipe_name(block: Block) -> str:
    return block.text.partition(":")[0].removeprefix("# ")


class Reader:
    """Somebody who does what the pages say, in a folder of their own, with a Hub of ours."""

    def __init__(self, folder: Path, hub: HubServer, monkeypatch, capfd):
        self.folder, self.hub, self._patch, self._capfd = folder, hub, monkeypatch, capfd

    @cached_property
    def environment(self) -> dict[str, str]:
        path = f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"
        cache = {"PRE_COMMIT_HOME": str(self.folder / "cache"), "TQDM_DISABLE": "1", "COLUMNS": "200"}
        return self.hub.environment(self.folder / "home", PATH=path, **cache)

    def enter(self, command: str) -> str:
        """Runs a command as it is typed, but for what the tables say, and returns what it says."""
        words = " ".join(entries(ADDED, command))
        typed = f"{replace(without_comment(command))} {words}".strip()
        if typed.startswith("entropy-gpt private serve"):
            lines = typed.splitlines()
            return self._open_page(*lines) if len(lines) > 2 else self._serve_and_ask(*lines)
        if typed.startswith("entropy-gpt private ask"):
            return self._serve_and_ask(f"entropy-gpt private serve {REPLACED['MODEL']} {FREE_PLACE}", typed)
        if GATEWAY in typed:
            with self.gateway() as address:
                return self.shell(typed.replace(GATEWAY, address))
        if typed.startswith("make "):
            return self.shell(f"make -n {typed.removeprefix('make ')}", ROOT)
        if typed.startswith("bash -n"):
            return self.shell(typed, ROOT)
        if "pre-commit" in typed:
            self.shell("git init --quiet .")
        of_the_hub = GPT2 in typed or USER in typed
        if typed.startswith("entropy-gpt ") and not of_the_hub:
            return self.run_here(shlex.split(typed))
        return self.shell(typed)

    def run_here(self, words: list[str]) -> str:
        """`entropy-gpt` in this process, which has imported all that it needs."""
        self._patch.setattr(sys, "argv", words)
        self._capfd.readouterr()
        status = main()
        output = self._capfd.readouterr()
        assert status == 0, output.err
        return output.out

    def shell(self, command: str, folder: Path | None = None) -> str:
        place = folder or self.folder
        process = subprocess.run(
            ["bash", "-c", command], cwd=place, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    def _serve_and_ask(self, serve: str, ask: str) -> str:
        with self._listening(serve) as address:
            return self.shell(ask.replace("ADDRESS", address))

    @contextmanager
    def _listening(self, command: str) -> Iterator[str]:
        """A command that listens, and where."""
        words = ["bash", "-c", f"exec {command.removesuffix(' &')}"]
        options = {"cwd": self.folder, "env": self.environment, "text": True}
        with subprocess.Popen(words, stdout=subprocess.PIPE, **options) as process:
            try:
                line = process.stdout.readline().strip()
                assert line.startswith(LISTENING)
                yield line.removeprefix(LISTENING).removeprefix("http://")
            finally:
                process.kill()

    @contextmanager
    def gateway(self, serve: str = SERVE, gateway: str = OPEN_GATEWAY) -> Iterator[str]:
        """A private server and a gateway before it, which takes a port that is free; its address."""
        with self._listening(f"{serve.removesuffix(' &')} {FREE_PLACE}") as self.server:
            command = gateway.removesuffix(" &").replace(PRIVATE_SERVER, self.server)
            with self._listening(f"{command} --port 0") as address:
                yield address

    def _open_page(self, serve: str, gateway: str, look: str) -> str:
        with self.gateway(serve, gateway) as address:
            return self.shell(look.replace("xdg-open", "curl --silent --show-error").replace(GATEWAY, address))


@pytest.fixture
def reader(request, shelf, hub, tmp_path, monkeypatch, capfd) -> Reader:
    if request.node.get_closest_marker("private"):
        pytest.importorskip("spu")
    folder = tmp_path / "reader"
    shutil.copytree(shelf, folder, symlinks=True)
    hub.put_folder(GPT2, folder / "gpt2")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    yield Reader(folder, hub, monkeypatch, capfd)
    datasets.enable_progress_bars()
    logging.enable_progress_bar()


def follow(reader: Reader, command: str):
    """Runs a command, and looks for what it is to leave and to say."""
    for name in entries(TAKEN_AWAY, command):
        shutil.rmtree(reader.folder / name)
    said = reader.enter(command)
    for text in chain(*entries(SAID, command)):
        assert text in said
    for name in chain(*entries(LEFT, command)):
        assert (reader.folder / name).exists(), f"{name} is not there"


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_blocks_say_their_language(block):
    """And the tool that they need, where it is not installed here: tests/compatibility runs these."""
    assert block.language.partition(" ")[0] in LANGUAGES


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated")  # by PEFT and TRL
@pytest.mark.parametrize("block", blocks("python"))
def test_code(block, reader, capfd):
    code = replace(block.text)
    for name, command in MADE_BY.items():
        if name in code:
            reader.enter(command)
    if GATEWAY in code or PRIVATE_SERVER in code:
        pytest.importorskip("spu")
        with reader.gateway() as address:
            code = code.replace(GATEWAY, address).replace(PRIVATE_SERVER, reader.server)
            exec(compile(code, block.name, "exec"), {"__name__": "__main__"})
    elif GPT2 in code:
        (reader.folder / "block.py").write_text(code, encoding="utf-8")
        reader.shell("python block.py")
    else:
        capfd.readouterr()
        exec(compile(code, block.name, "exec"), {"__name__": "__main__"})
        if block.output is not None:
            assert capfd.readouterr().out == block.output
    if "save_model()" in code:
        assert AutoModelForCausalLM.from_pretrained("fine_tuned", trust_remote_code=True).config.notation


@pytest.mark.slow
@pytest.mark.parametrize("page", SESSIONS)
def test_sessions(page, reader, capfd):
    typed = {"__name__": "__main__"}
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            capfd.readouterr()
            exec(compile(block.text, block.name, "exec"), typed)
            assert capfd.readouterr().out == (block.output or ""), block.name
    assert {"entropies.png", "attention.png", "heads.png"} <= {path.name for path in reader.folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_commands(command, reader):
    follow(reader, command)
    if command.startswith("entropy-gpt push") and "--dry-run" not in command:
        assert {"config.json", "results.json", "README.md"} <= {*reader.hub.files(f"{USER}/my-model")}
    if command.startswith("entropy-gpt card"):
        assert ModelCard.load(reader.folder / "path/to/folder/README.md").data.license == "apache-2.0"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT
@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipes(block, reader):
    name, command = re.match(r"# (\S+): (.*)", block.text).groups()
    assert yaml.safe_load((reader.folder / name).read_text(encoding="utf-8"))
    follow(reader, command)


@pytest.mark.parametrize("command", inline_commands())
def test_commands_in_sentences(command, monkeypatch, capfd):
    """Options and names are known; nothing is run."""
    words = shlex.split(command)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "python":
        assert "__main__" in Path(importlib.util.find_spec(words[2]).origin).read_text(encoding="utf-8")
    else:
        monkeypatch.setattr(sys, "argv", ["entropy-gpt", *words[1:], "--help"])
        assert main() == 0, capfd.readouterr().err


def test_no_entry_of_a_table_is_left_over():
    recipe_commands = [re.match(r"# \S+: (.*)", block.text)[1] for block in BLOCKS if block.language == "yaml"]
    all_commands = [command for block in BLOCKS if block.language == "bash" for command in block.commands]
    all_commands += recipe_commands
    for table in (ADDED, TAKEN_AWAY, LEFT, SAID):
        for beginning in table:
            assert any(command.startswith(beginning) for command in all_commands), beginning
    assert {*MADE_BY.values()} <= {without_comment(command) for command in all_commands}
    for name in REPLACED:
        assert any(re.search(_as_word(name), block.text) for block in BLOCKS), name


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.parametrize("name", TASKS)
def test_pages_of_tasks_begin_with_what_to_run(name):
    (page,) = (page for page in DOCS if page.stem == name)
    assert re.match(r"# .+\n\n```(bash|python)\n", page.read_text(encoding="utf-8"))


def test_the_index_has_every_page():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {*LINK.findall(text)} == {page.name for page in DOCS} - {"index.md"}


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in LINK.findall(text):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, link


@pytest.mark.parametrize("figure", FIGURES, ids=[figure.name for figure in FIGURES])
def test_figures_can_be_read_aloud_and_on_any_page(figure):
    space = "{http://www.w3.org/2000/svg}"
    root = ET.parse(figure).getroot()
    assert root.find(f"{space}title").text
    assert root.find(f"{space}desc").text
    background = next(element for element in root if element.tag == f"{space}rect")
    assert background.get("fill") == "#ffffff"
    assert any(figure.name in page.read_text(encoding="utf-8") for page in PAGES)
