"""What a ladder promised, compared with what the first minute of serving gave."""

from __future__ import annotations

import numpy as np

from bita_vllm.tree.ladder_search import gains_over_plain

FIRST_SECONDS = 60.0
# Below this share of it a promise was not met: acceptance differs between texts, and served requests have prompts.
MET = 0.9


class Promise:
    """Gains that a ladder was chosen by; asked once, when the first minute with drafts is over."""

    def __init__(
        self,
        # [T] accepted length, by template
        lengths: np.ndarray,
        # [T+1, N] seconds of a step, plain decoding last, by batch size
        seconds: np.ndarray,
    ) -> None:
        self._lengths, self._seconds = lengths, seconds
        self._began: float | None = None
        self._done = False

    def what_came(
        self,
        now: float,
        template: int,
        num_requests: int,
        # [T], as they are now
        lengths: np.ndarray,
        # [T+1, N]
        seconds: np.ndarray,
    ) -> str | None:
        """A sentence for the log if the first minute was slower than promised; None otherwise, and from then on.

        Args:
            now: seconds on any clock.
            template: that blocks of that many requests have; negative for plain decoding.
        """
        if self._done or template < 0:
            return None
        if self._began is None:
            self._began = now
        if now - self._began < FIRST_SECONDS:
            return None
        self._done = True
        promised = self._gain(template, num_requests, self._lengths, self._seconds)
        came = self._gain(template, num_requests, lengths, seconds)
        if came >= MET * promised:
            return None
        place = template, num_requests - 1
        steps = [table[place] / table[-1, num_requests - 1] for table in (self._seconds, seconds)]
        requests = f"{num_requests} request" + "s" * (num_requests > 1)
        return (
            f"the ladder promised {promised:.2f} times plain decoding's tokens at {requests}, but the "
            f"first minute gave {came:.2f} ({lengths[template]:.2f} tokens a step where {self._lengths[template]:.2f} "
            f"were expected, a step {steps[1]:.2f} times a plain one where it was {steps[0]:.2f}); rows follow what is "
            "seen, and 'bita tune' times this machine anew."
        )

    @staticmethod
    def _gain(template: int, num_requests: int, lengths: np.ndarray, seconds: np.ndarray) -> float:
        return float(
            gains_over_plain(lengths, seconds[:-1], seconds[-1])[template, num_requests - 1]
        )
