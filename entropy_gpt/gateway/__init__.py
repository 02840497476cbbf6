"""A gateway on the client's machine: OpenAI's protocol and a page on one side, a private server on the other."""
