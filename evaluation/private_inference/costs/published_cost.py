"""What the results of a model tell of a private inference."""

from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost
from entropy_gpt.evaluation.records.results import AnswerCheck, PrivateCost


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
