"""
Workflows of `entropy-gpt` for Python. Each works like the command of the same name, prints nothing, and is imported
when it is first used:

    import entropy_gpt

    run = entropy_gpt.train("python-stdlib-small", max_steps=500)
    report = entropy_gpt.convert("openai-community/gpt2", to="EReg(SM(t)+ScFuFFN)", output="my_model")
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from entropy_gpt.conversion.errors import UserError
    from entropy_gpt.evaluation.measuring.text_diagnostics import diagnose_text
    from entropy_gpt.evaluation.private_inference.inference import PrivateModel
    from entropy_gpt.workflows.convert import convert
    from entropy_gpt.workflows.evaluate import evaluate
    from entropy_gpt.workflows.export import export
    from entropy_gpt.workflows.private_client import PrivateClient
    from entropy_gpt.workflows.publish import publish
    from entropy_gpt.workflows.report import report
    from entropy_gpt.workflows.train import train


__all__ = [
    "PrivateClient",
    "PrivateModel",
    "UserError",
    "convert",
    "diagnose_text",
    "evaluate",
    "export",
    "publish",
    "report",
    "train",
]

_MODULES = {
    "PrivateClient": "workflows.private_client",
    "PrivateModel": "evaluation.private_inference.inference",
    "UserError": "conversion.errors",
    "convert": "workflows.convert",
    "diagnose_text": "evaluation.measuring.text_diagnostics",
    "evaluate": "workflows.evaluate",
    "export": "workflows.export",
    "publish": "workflows.publish",
    "report": "workflows.report",
    "train": "workflows.train",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as missing:
        from entropy_gpt.conversion.errors import missing_package

        raise ModuleNotFoundError(missing_package(f"{__name__}.{name}", missing), name=missing.name) from missing


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
