"""A small study, made up."""

from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadwiseEntropy
from entropy_gpt.evaluation.measuring.perplexity import Likelihood, Windows
from entropy_gpt.evaluation.records.results import Conditions, LikelihoodResult
from entropy_gpt.programs.study.records import CONVERTED, TRAINED, Study, StudyRun


TOKENS = 1000


def likelihood(nats: float, corpus: str) -> LikelihoodResult:
    """Of so many nats a token."""
    origin = {"versions": {"torch": "2"}, "git_revision": None, "machine": "a machine"}
    conditions = Conditions(corpus, f"{corpus} 1.0", 4096, 127, TOKENS, "float32", 0, **origin)
    windows = Windows(127, 127, separate=False, bos=False)
    return LikelihoodResult(Likelihood(nats * TOKENS, TOKENS, 300, 3000, windows), conditions, 1.0)


def make_run(notation: str, nats: float | None, source: StudyRun | None = None, **settings) -> StudyRun:
    """A trained or converted run; without nats, one that diverged."""
    settings = {
        **{"notation": notation, "learning_rate": 1e-3, "seed": 0, "context": 128, "n_layer": 6, "n_head": 6},
        **{"n_embd": 192, "dataset": "python-stdlib", "max_steps": 100, "warmup_steps": 0.05},
        "per_device_train_batch_size": 8,
        **settings,
    }
    name = "-".join(map(str, [notation, nats, *settings.values()]))
    run = StudyRun(name, CONVERTED if source else TRAINED, settings, source and source.name, notation, 10_000)
    if nats is None:
        run.diverged = "the loss is nan"
        return run
    run.tokens = 1024 * settings.get("heal_steps", settings["max_steps"])
    run.seconds_per_step = 0.5
    run.validation = likelihood(nats - 1, "library, the part kept apart")
    run.test = {"networkx": likelihood(nats - 0.1, "networkx"), "sympy": likelihood(nats + 0.1, "sympy")}
    run.heads = HeadwiseEntropy([[3.0, 1.0], [2.0, 3.5]], 3.88)
    return run


def make_study(**groups: list[StudyRun]) -> Study:
    """Of these runs."""
    runs = {run.name: run for members in groups.values() for run in members}
    return Study("sha256:0", runs, {group: [run.name for run in members] for group, members in groups.items()})
