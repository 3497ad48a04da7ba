"""Verifier of the arithmetic task: reads the answer after the last `#` of a completion. It knows nothing of models or tokens."""

import re

_FINAL_ANSWER = re.compile(r"#(-?\d+)\s*$")


def exact_match(record: dict, completion: str) -> float:
    """Return 1.0 if `completion` ends with `#` and the integer in `record["answer"]`, else 0.0."""
    found = _FINAL_ANSWER.search(completion)
    return float(found is not None and int(found.group(1)) == int(record["answer"]))
