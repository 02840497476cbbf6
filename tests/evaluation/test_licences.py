"""Names of licences."""

import pytest

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.showing.licences import check_licence


@pytest.mark.parametrize("name", [None, "apache-2.0", "mit", "openrail++", "llama3.1", "other"])
def test_a_licence_that_the_hub_knows_is_taken(name):
    check_licence(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Apache 2.0", "Did you mean apache-2.0"),
        ("MIT", "Did you mean mit"),
        ("gpl3", "Did you mean .*gpl-3.0"),
        ("of my own", "Any other licence is 'other'"),
    ],
)
def test_any_other_is_refused_with_the_nearest_name(name, message):
    with pytest.raises(UserError, match=f"--license {name}: .*{message}"):
        check_licence(name)
