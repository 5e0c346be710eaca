"""What ends a stage in a sentence: wrong input, a lost cluster, a run that cannot go on."""


class InputError(ValueError):
    """Something the user can put right; its text says the rule, what came, and the way out."""


class Lost(RuntimeError):
    """What a job worked with went away, such as its cluster; the same command continues."""


class RunError(RuntimeError):
    """A run that cannot go on, though all that was asked for was right; its text says why, and what
    is kept."""


def check(rule: bool, sentence: str) -> None:
    """Raise InputError with the sentence where the rule does not hold."""
    if not rule:
        raise InputError(sentence)
