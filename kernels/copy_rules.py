"""What all sources of copies have in common: bounds of matches, and how likely copied tokens are.

With m tokens in a row that agree with the text (the match, and the copies before this one), s = STRENGTH:

    odds(the next one agrees) = m / PRIOR * (hits + s) / (expected hits + s) / ((misses + s) / (expected misses + s))

m / PRIOR, that is P = m / (m + 2), was measured on greedy answers of SmolLM2-135M-Instruct to Spec-Bench
(`benchmarks/spec_bench.py chances`): with nothing to fit, it tells held-out tasks better than a table by length of the
match and place in the copy that other tasks were counted for. Hits and misses are of the request's own copies, whether
a block held them or not, compared with the tokens that were then emitted; expected are those that P says. They fade,
by KEPT from one judged copy to the next. So a request whose copies are wrong loses them, and one whose copies are
right gets longer ones.
"""

MIN_MATCH, MAX_MATCH = 1, 32  # tokens of a match
MAX_COPIES = 15  # of a request in a step
PRIOR = 2.0
STRENGTH = 4.0
KEPT = 0.98
