"""Figures as people read them."""


def three(figure: float) -> str:
    """About three digits, and never an exponent for large ones: 2,505, 31.4, 0.002."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def duration(seconds: float) -> str:
    """In the unit that suits it: 0.92 ms, 730 ms, 2.19 s, 14 min."""
    if seconds < 1:
        return f"{1000 * seconds:{'.0f' if seconds >= 0.01 else '.2g'}} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.0f} min"
