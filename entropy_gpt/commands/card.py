"""`entropy-gpt card`: writes a model's card from its results."""

from entropy_gpt.training.storage import check_folder as check_writable

from .push import Licence, Model, Results, check_folder


def card(folder: Model, results: Results = None, licence: Licence = None):
    """
    Write the card of a model's folder, README.md, from its results. `push` writes a card by itself.

    The results are those in the folder (results.json) and those of --results. A result belongs to
    the model if it has the hash of the model's weights.

    Example: entropy-gpt card converted_model --results evaluation_output --license apache-2.0
    """
    check_folder(folder, results)
    if folder.is_dir():
        check_writable(folder, "DIR")  # before the imports, which take seconds
    from entropy_gpt.terminal.publish import run_card

    run_card(folder, results or [], licence)
