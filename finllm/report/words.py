"""How figures are written: per cent with one decimal, intervals in brackets."""

from finllm.scores import Interval


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f}"


def interval(figure: Interval, unit: str = "") -> str:
    """A share in per cent with its interval."""
    return f"{percent(figure.value)}{unit} [{percent(figure.low)}, {percent(figure.high)}]"


def points(difference: Interval, unit: str = "") -> str:
    """A difference of shares in percentage points with its interval."""
    return f"{100 * difference.value:+.1f}{unit} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def plain(figure: Interval, digits: int = 3) -> str:
    """A figure that is no share, with its interval."""
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def p_value(p: float) -> str:
    """A probability in a test; below 0.001 only that."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def texts(count: int) -> str:
    """So many texts."""
    return f"{count:,} text{'' if count == 1 else 's'}"
