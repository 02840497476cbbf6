"""How far the quickstart is: its stages, and the time left for all of them."""

from collections.abc import Callable, Mapping

from rich.console import Console

from entropy_gpt.terminal.progress import Line, format_seconds
from entropy_gpt.training.progress import Stage


# Measured on two cores, as all work is counted in steps.
SECONDS_OF_A_STEP = 0.09


class Stages(Line):
    """
    The quickstart as one line: a bar over all stages, the time left, and which stage is under way.

    Args:
        console (`Console`): Where each stage gets a heading.
        work (`Mapping[str, float]`):
            The stages in order, and the work of each in training steps; 0 if an earlier run has finished it.
    """

    def __init__(self, console: Console, work: Mapping[str, float]):
        super().__init__("quickstart", sum(work.values()))
        self._console, self._work = console, work
        about = format_seconds(SECONDS_OF_A_STEP * self.total)
        console.print(f"{len(work)} stages, about {about} in all on two cores", highlight=False)

    def begin(self, name: str):
        """Prints a heading for a stage. All work before it counts as done."""
        names = list(self._work)
        number = names.index(name) + 1
        self.reach(sum(self._work[other] for other in names[: number - 1]))
        self.say(f"stage {number} of {len(names)}")
        left = f", {self.time_left} in all" if self.time_left else ""
        self._console.print(f"[bold]stage {number} of {len(names)}[/]{left}: {name}", highlight=False)

    def follow(self, line: Stage) -> Callable[[int, int], None]:
        """What training calls after each step, to move the bar of its own stage and this one."""
        begun, first = self.completed, None

        def reach(step: int, steps: int):
            nonlocal first
            first = step if first is None else first  # a resumed run begins with the steps of its checkpoint
            line.reach(step, steps)
            self.reach(begun + step - first)

        return reach
