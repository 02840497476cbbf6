"""Errors as OpenAI's protocol has them."""

import sys
import traceback

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import NoServerError


class ProtocolError(UserError):
    """
    What a request is answered with where it fails.

    Args:
        status (`int`): HTTP's number for it.
        message (`str`): What was wrong, and what to do.
        param (`str`, *optional*): The field that is wrong.
        code (`str`, *optional*): A word for programs.
        headers (`dict[str, str]`): What HTTP wants besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        # OpenAI's client repeats some requests by itself. A secret one costs too much for that.
        self.headers = {"x-should-retry": "false", **(headers or {})}

    def content(self) -> dict:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def of_the_server(error: PrivateInferenceError) -> ProtocolError:
    """What is said where the private server fails, or can't be reached."""
    if isinstance(error, NoServerError):
        return ProtocolError(503, f"the private server can't be reached: {error}", code="private_server_missing")
    return ProtocolError(502, f"the private server gave no answer: {error}", code="private_server_failed")


def of_the_gateway(error: Exception) -> ProtocolError:
    """
    What is said of a fault of the gateway itself. The log has its type and places in the code; its message may hold a
    prompt.
    """
    print(f"a request failed: {type(error).__name__}", *traceback.format_tb(error.__traceback__), file=sys.stderr)
    return ProtocolError(500, "the gateway failed; its log says why. It goes on.", code="gateway_failed")
