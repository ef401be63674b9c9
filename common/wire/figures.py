"""How precisely a measured figure travels: as far as it is shown, so that it carries nothing else.

A loss of fp64 could carry 63 bits of a hospital's choice in digits that nobody looks at. A figure
of eight significant digits, none of them beyond the seventh decimal, and of at most a million, is
one of 550 million: less than 30 bits. Four decimals are shown; with fewer digits than these, a
figure that is rounded twice would now and then be shown one off.
"""

SIGNIFICANT_DIGITS, DECIMALS = 8, 7
LARGEST_FIGURE = 1e6
"""Mean losses are below 100; no exchange takes so many seconds."""


def rounded(value: float) -> float:
    """Return a figure as it may travel.

    >>> rounded(3.0712345678), rounded(0.00012345678), rounded(1234.567891), rounded(-0.0)
    (3.0712346, 0.0001235, 1234.5679, 0.0)
    """
    return round(float(f"{value:.{SIGNIFICANT_DIGITS}g}"), DECIMALS) + 0.0


def fault_of(value: float) -> str:
    """Say why a finite number is no figure that may travel; empty if it is one, to the bit.

    >>> [fault_of(value) for value in (3.0712346, 3.07123456, -0.5, 2e6)]
    ['', 'is not rounded to 8 digits', 'is negative', 'is beyond 1e+06']
    """
    if value < 0:
        return "is negative"
    if value > LARGEST_FIGURE:
        return f"is beyond {LARGEST_FIGURE:g}"
    same = repr(value) == repr(rounded(value))
    return "" if same else f"is not rounded to {SIGNIFICANT_DIGITS} digits"
