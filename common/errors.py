"""Errors that reach a person: one line of what is wrong, what is allowed, and the fix."""


class FedrxError(Exception):
    """Base of the errors that the command line prints without a traceback."""

    exit_status = 1


class UserError(FedrxError):
    """Input that the user can mend (exit status 2).

    Args:
        what: What is wrong, naming the key or file. Never patient ids, dates or cell values.
        allowed: What would be accepted.
        fix: What to do about it.

    >>> str(UserError("adapter.rank=0", allowed="1 to 512", fix="set adapter.rank"))
    'adapter.rank=0; allowed: 1 to 512; fix: set adapter.rank'
    """

    exit_status = 2

    def __init__(self, what: str, *, allowed: str = "", fix: str = "") -> None:
        self.what, self.allowed, self.fix = what, allowed, fix
        parts = [what]
        if allowed:
            parts.append(f"allowed: {allowed}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_user_error, (type(self), self.what, self.allowed, self.fix)


class SettingError(UserError):
    """A setting of how to train that cannot be had: quotes it, what the machine can do, and sizes.

    Without privacy, when sizes are told anyway, a hospital tells it to the server, which has sent
    the setting; never of a record or of a path.
    """


def _rebuild_user_error(kind: type[UserError], what: str, allowed: str, fix: str) -> UserError:
    return kind(what, allowed=allowed, fix=fix)


class RunFailed(FedrxError):
    """A run that started and could not be finished (exit status 1)."""


class DiskFull(RunFailed):
    """A file that could not be written for want of room; the text names it without its folder."""
