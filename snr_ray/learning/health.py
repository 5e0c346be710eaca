"""When training has gone wrong for good: steps that cannot be taken, or a loss that left its range.

Seen on the numbers that all workers share, so that all stop at the same step.
"""

import math
from dataclasses import dataclass

from snr_ray.errors import RunError

SKIPS_IN_A_ROW = 10
"""A batch with bad numbers costs a step or two; so many say that the weights are bad."""
LOSS_RATIO = 10.0
"""A loss beyond so many times its first value is far above it. Untrained models begin at their
worst: one that stays there has lost its way."""
HIGH_STEPS = 100
"""How long a loss may stay that high before the run ends."""


class Diverged(RunError):
    """Training that cannot come to anything any more."""


@dataclass
class Health:
    """What the losses of a run say about it."""

    lr: float
    """Peak learning rate, for the sentence."""
    first_loss: float = math.nan
    """Loss of the first step that was taken; NaN before it, when no loss is far above."""
    well_at: int = 0
    """Last step at which the loss was in its range."""

    @property
    def limit(self) -> float:
        """The largest loss that is not far above the first."""
        return self.first_loss + LOSS_RATIO * max(1.0, abs(self.first_loss))

    def judge(self, step: int, loss: float, skipped: int, *, last: bool) -> bool:
        """Whether the weights of a step are worth keeping.

        Args:
            step: now.
            loss: mean of late; NaN where no step was taken, which leaves good weights good.
            skipped: most steps in a row that were skipped since the last call.
            last: nothing comes after this step.

        Raises:
            Diverged: if they will not be any more.
        """
        if skipped >= SKIPS_IN_A_ROW or (last and math.isnan(self.first_loss)):
            raise Diverged(
                f"Training stopped at step {step}: the gradients of {skipped} steps in a row were "
                f"not finite; {self._way_out}"
            )
        well = not loss > self.limit
        if well:
            self.well_at = step
        elif last or step - self.well_at >= HIGH_STEPS:
            raise Diverged(
                f"Training diverged: at step {step} the loss is {loss:.3g}, far above the "
                f"{self.first_loss:.3g} it began with, since step {self.well_at}; {self._way_out}"
            )
        return well

    @property
    def _way_out(self) -> str:
        return (
            "the last good checkpoint, if there was one, is kept. Train anew with a lower train.lr "
            f"(it was {self.lr:g}) and another --out."
        )
