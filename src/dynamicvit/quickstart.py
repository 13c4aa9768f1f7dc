"""stub while building"""


def quickstart(output: str = "quickstart") -> None:
    """Quick.

    Args:
        output: where.
    """
