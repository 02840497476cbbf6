"""`entropy-gpt card`: a model's card, out of its results."""

from .push import Licence, Model, Results


def card(folder: Model, results: Results = None, licence: Licence = None):
    """
    Write the card of a model's folder, README.md, from its results and nothing else; `push` makes one by itself.

    The results are those in the folder (results.json), or those that --results names; they are known by the hash of
    the weights.

    Example: entropy-gpt card converted_model --results evaluation_output --license apache-2.0
    """
    from entropy_gpt.workflows.publish import write_card

    write_card(folder, results or [], licence)
