"""Makes certificates, and prints what they are for."""

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
    print(f"server: --cert {output}/server.pem --key {output}/server.key --ca {output}/ca.pem")
    for client in options["clients"]:
        print(f"{client}: --cert {output}/{client}.pem --key {output}/{client}.key --ca {output}/ca.pem")
    print(f"{output}/ca.key can sign further certificates: keep it apart, or delete it")
