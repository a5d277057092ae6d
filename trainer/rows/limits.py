"""How much of an input is in memory at once, and what is more than any input of pairs can mean."""

LONGEST_ROW = 1 << 26  # bytes
LONGEST_HEADER = 1 << 20  # bytes
MOST_COLUMNS = 1 << 12
ROWS = 1 << 14  # a part: enough to sort by length and to deal to ranks


def too_long(other: str = "") -> str:
    return f"longer than {LONGEST_ROW:,} bytes{other}; shorten it"


def too_many_columns(count: int) -> str:
    return f"{count:,} columns, and a table has {MOST_COLUMNS:,} at most; leave some out"
