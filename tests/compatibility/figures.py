"""How a difference reads in the table of the tools."""


def describe(difference: float) -> str:
    return f"equal within {difference:.0e}" if difference else "equal"
