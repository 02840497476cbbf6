"""What the results of a model tell of a private inference."""

from evaluation.results import AnswerCheck, PrivateCost

from .cost import InferenceCost


def as_private_cost(cost: InferenceCost, check: AnswerCheck | None = None) -> PrivateCost:
    """What the results of a model tell of the inference, and of how its answer compares with the clear."""
    return PrivateCost(
        protocol=cost.settings.protocol,
        context=cost.context,
        answers=cost.answers,
        total_bytes=cost.total_bytes,
        rounds=round(cost.round_trips),
        seconds=cost.seconds,
        network=cost.network,
        versions=cost.versions,
        git_revision=cost.git_revision,
        machine=cost.machine,
        check=check,
    )
