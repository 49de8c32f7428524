"""Checks that a message says how to fix the problem."""

import re

DO = (
    "ask|call|choose|divide|end|evaluate|give|install|leave|let|look|lower|make|measure|mend|move|name|pass|"
    "pip install|read|report|resize|restore|run|say|set|start|store|take|upgrade|use|wait|write"
)
# an imperative that begins a clause, perhaps after the case it applies to ("of bytes write ...")
IMPERATIVE = rf"(?:[:;?,(.] |\b(?i:or|and) |`)(?:(?i:of|for|in|with|where|if) [^:;,]+ |{{go_on}})?(?i:{DO})\b"
OF_A_READER = r"\bexpected\b"
PUT_IN = r"{(?:(?:upgrade|_instead)\(.*|hint|instead|advice)}"  # by its name in the source
WAY_OUT = re.compile(f"{IMPERATIVE}|{OF_A_READER}|{PUT_IN}")


def has_way_out(message):
    """Returns whether a message says what to do."""
    return WAY_OUT.search(message) is not None
