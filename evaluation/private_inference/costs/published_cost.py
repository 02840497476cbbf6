"""The cost of a private inference, as a model's results record it."""

from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost
from entropy_gpt.evaluation.records.results import AnswerCheck, PrivateCost


def as_private_cost(cost: InferenceCost, check: AnswerCheck | None = None) -> PrivateCost:
    """
    The cost as a model's results record it, with how the answer compares with the model in the clear. What was done
    before the prompt came counts too.
    """
    before = cost.first_phase()
    return PrivateCost(
        protocol=cost.settings.protocol,
        context=cost.context,
        answers=cost.answers,
        total_bytes=before.total_bytes + cost.total_bytes,
        rounds=round(before.round_trips + cost.round_trips),
        seconds=before.seconds + cost.seconds,
        network=cost.network,
        versions=cost.versions,
        git_revision=cost.git_revision,
        machine=cost.machine,
        check=check,
    )
