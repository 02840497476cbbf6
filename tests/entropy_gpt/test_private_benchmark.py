"""`entropy-gpt private benchmark`: refused before anything is measured, planned, and measured in two goes."""

import subprocess
import sys
from pathlib import Path

import pytest

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.private_inference.costs.paper_table import TODAY
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost
from entropy_gpt.terminal.private_table import run
from entropy_gpt.workflows.private_table import MEASURED


COMMAND = Path(sys.executable).with_name("entropy-gpt")
SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}
ARGUMENTS = ["--n-layer", "2", "--n-embd", "32", "--n-head", "2", "--seq", "8", "--vocab-size", "64"]


def benchmark(output: Path, notations=("SM",), networks=(), dry_run=False, whole=False, prepared=False, **sizes):
    options = {**SIZES, **sizes, "context": 8, "networks": networks, "timeout": 600}
    options |= {"whole": whole, "prepared": prepared}
    run(notations, dry_run, output=output, **options)


def test_what_can_not_be_measured_is_refused(tmp_path):
    output = tmp_path / "output"
    for options, message in (
        ({"notations": ["SM+LM"]}, "Unknown token 'LM'"),
        ({"n_head": 5}, "n_head=5 does not divide n_embd=32"),
        ({"networks": ["fast"]}, "network 'fast' is not known"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark(output, **options)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds no benchmark"):
        benchmark(tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is not a writable folder"):
        benchmark(tmp_path / "notes.txt")
    assert not output.exists()


def test_without_the_engine_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spu", None)
    with pytest.raises(UserError, match=r"pip install 'entropy-gpt\[private\]'"):
        benchmark(tmp_path / "output")


def test_a_plan_measures_nothing(tmp_path, capsys):
    benchmark(tmp_path / "output", ["SM+LN+G", "SM+ScFuFFN"], dry_run=True, whole=True, prepared=True)
    lines = capsys.readouterr().out.splitlines()
    planned = [line for line in lines if "to be measured" in line]
    parts = ("SM+LN+G", "SM+ScFuFFN", "embedding and head")
    titles = (TODAY, *parts, *(f"{part}, prepared" for part in parts), "SM+ScFuFFN, whole")
    assert len(planned) == len(titles)
    assert all(line.strip().startswith(title) for line, title in zip(planned, titles, strict=True))
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
@pytest.mark.private
def test_what_was_measured_is_not_measured_again(tmp_path, capsys):
    pytest.importorskip("spu")
    output = tmp_path / "output"
    command = [COMMAND, "private", "benchmark", *ARGUMENTS, "--output", output, "SM+ScFuFFN"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    earlier = {path: path.stat().st_mtime_ns for path in (output / MEASURED).iterdir()}
    assert {path.stem for path in earlier} == {"sm-ln-g-as-it-is-run-today", "sm-scfuffn", "embedding-and-head"}

    benchmark(output, ["SM+ScFuFFN"], whole=True, prepared=True)
    assert {path: path.stat().st_mtime_ns for path in earlier} == earlier
    whole = InferenceCost.load(output / MEASURED / "sm-scfuffn-whole.json")
    block = InferenceCost.load(output / MEASURED / "sm-scfuffn.json")
    # Two blocks are all that there are.
    total = sum(step.total_bytes for step in block.steps if step.layer is not None)
    assert total == pytest.approx(sum(step.total_bytes for step in whole.steps if step.layer is not None), rel=0.01)
    prepared = InferenceCost.load(output / MEASURED / "sm-scfuffn-prepared.json")
    assert prepared.before and prepared.total_bytes < block.total_bytes
    assert "A whole run of SM+ScFuFFN, 2 blocks" in (output / "table.md").read_text()
    assert "| in two phases | MB before | MB after |" in (output / "table.md").read_text()
    assert (output / "costs.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert all(str(output / name) in shown for name in ("table.md", "costs.png", MEASURED))
