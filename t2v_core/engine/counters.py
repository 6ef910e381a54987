"""What the engine has done since it started, for metrics: sums that only grow."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Of one latent shape. Occupancy is rows / budget_rows; mean times are sums over their counts."""

    steps: int = 0
    step_s: float = 0.0
    rows: int = 0
    budget_rows: int = 0  # what the same steps could have held
    added: int = 0
    admitted: int = 0
    queue_s: float = 0.0
    set_aside: int = 0  # pauses of a request for one that was due before it
    finished: int = 0
    failed: int = 0
    cancelled: int = 0  # or taken out, to go on elsewhere
    out_of_memory: int = 0  # steps and previews that did not fit
