"""Makes certificates, and prints what they are for."""

import shlex
from pathlib import Path

from entropy_gpt.workflows.certificates import make_certificates


def run(names: list[str], output: Path, **options):
    """
    Makes the files.

    Args:
        names (`list[str]`): The server's.
        output (`Path`): The folder.
        options: Further arguments of [`make_certificates`].

    Raises:
        `UserError`: As [`make_certificates`].
    """
    for path in make_certificates(names, output, **options):
        print(path)
    for name in ("server", *options["clients"]):
        files = [shlex.quote(f"{output}/{file}") for file in (f"{name}.pem", f"{name}.key", "ca.pem")]
        print("{}: --cert {} --key {} --ca {}".format(name, *files))
    print(f"{output}/ca.key can sign further certificates: keep it apart, or delete it")
