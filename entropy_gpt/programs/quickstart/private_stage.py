"""The last stage of the quickstart: two of its models answer the same prompt under secure computation."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_plots import draw_costs
from entropy_gpt.evaluation.private_inference.costs.published_cost import as_private_cost
from entropy_gpt.evaluation.private_inference.parties.engine import check_engine
from entropy_gpt.evaluation.private_inference.program.cost import by_operation
from entropy_gpt.evaluation.records.results import PrivateCost
from entropy_gpt.terminal.private import print_answer
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.files import written_whole
from entropy_gpt.training.progress import Progress
from entropy_gpt.workflows.private import demonstrate
from entropy_gpt.workflows.private_answer import PrivateAnswer


NEW_TOKENS = 2
BEFORE, AFTER = "before the prompt", "after the prompt"

console = Console()


def answer_privately(models: dict[str, Path], prompt: str, output: Path, progress: Progress):
    """
    Has each model answer between two processes, checks the answer, and shows where the bytes go. What was computed in
    an earlier run is there still.

    Args:
        models (`dict[str, Path]`): Folders, by how the models are called; the first is what others are compared with.
        prompt (`str`): The same for all.
        output (`Path`): The quickstart's folder.
        progress (`Progress`): Receives the stages of each answer.

    Raises:
        `UserError`: If an answer is not the one in the clear.
    """
    try:
        check_engine()
    except PrivateInferenceError as error:
        console.print(f"no private answers: {error}", markup=False, soft_wrap=True)
        return
    answers = {title: _answer(folder, prompt, output, progress) for title, folder in models.items()}
    costs = {title: answer.cost for title, answer in answers.items()}
    for title, answer in answers.items():
        console.print(f"\n[bold]{escape(title)}[/bold], between two processes that keep prompt and weights secret:")
        print_answer(prompt, answer)
    before = {title: cost.first_phase() for title, cost in costs.items()}
    bars = {
        f"{title}, {when}": cost for title in costs for when, cost in ((BEFORE, before[title]), (AFTER, costs[title]))
    }
    with written_whole(output / "pictures" / "private_costs.png") as path:
        draw_costs(bars).savefig(path, format="png")
    operations = list(dict.fromkeys(part.name for cost in costs.values() for part in by_operation(cost)))
    parts = [{part.name: part.total_bytes for part in by_operation(cost)} for cost in costs.values()]
    rows = [(name, *(f"{part.get(name, 0) / 1e6:.2f}" for part in parts)) for name in operations]
    for when, phase in ((AFTER, costs), (BEFORE, before)):
        rows.append((f"all {when}", *(f"{cost.total_bytes / 1e6:.2f}" for cost in phase.values())))
    both = [cost.total_bytes + before[title].total_bytes for title, cost in costs.items()]
    rows.append(("both phases", *(f"{total / 1e6:.2f}" for total in both)))
    for when, phase in ((AFTER, costs), (BEFORE, before)):
        rows.append((f"seconds {when}", *(f"{cost.seconds:.1f}" for cost in phase.values())))
    console.print(make_table((f"MB sent by both parties {AFTER}", *costs), rows))
    console.print(
        f"private answers of {NEW_TOKENS} tokens, checked against the clear; the set-up of a connection, "
        f"{next(iter(costs.values())).set_up_bytes / 1e6:.0f} MB, is apart",
        style="dim",
    )


def private_costs(name: str, output: Path) -> list[PrivateCost]:
    """
    What the private answer of a model cost, in this run or an earlier one; nothing where there is none.

    Args:
        name (`str`): Name of the model's folder.
        output (`Path`): The quickstart's folder.

    Raises:
        `UserError`: If the answer's file is broken.
    """
    place = _place(name, output)
    if not place.exists():
        return []
    answer = _load(place)
    return [as_private_cost(answer.cost, answer.check)]


def _answer(folder: Path, prompt: str, output: Path, progress: Progress) -> PrivateAnswer:
    place = _place(folder.name, output)
    if not place.exists() or not _load(place).cost.before:  # one of an older version has a single phase
        answer = demonstrate(folder, prompt, new_tokens=NEW_TOKENS, prepared=True, progress=progress)
        with written_whole(place) as path:
            answer.save(path)
    return _load(place)


def _place(name: str, output: Path) -> Path:
    return output / "private" / f"{name}.json"


def _load(place: Path) -> PrivateAnswer:
    return PrivateAnswer.load(place)
