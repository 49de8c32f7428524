"""What a message says of the way out."""

import re

DO = (
    "ask|call|choose|divide|end|evaluate|give|install|leave|let|look|lower|make|measure|mend|move|name|pass|"
    "pip install|read|report|resize|restore|run|say|set|start|store|take|upgrade|use|wait|write"
)
# an imperative that begins a clause, perhaps behind the case that it is for ("of bytes write ...")
IMPERATIVE = rf"(?:[:;?,(.] |\b(?i:or|and) |`)(?:(?i:of|for|in|with|where|if) [^:;,]+ |{{go_on}})?(?i:{DO})\b"
OF_A_READER = r"\bexpected\b"
PUT_IN = r"{(?:(?:upgrade|_instead)\(.*|hint|instead|advice)}"  # as the source names it
WAY_OUT = re.compile(f"{IMPERATIVE}|{OF_A_READER}|{PUT_IN}")


def has_way_out(message):
    """Whether a message tells what to do."""
    return WAY_OUT.search(message) is not None
