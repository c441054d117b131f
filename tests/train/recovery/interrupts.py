"""Ctrl-C, or a kill, before a certain step of a script."""

from train.command_line import Interrupt


class Killed(BaseException):
    """In place of a kill, after which nothing is done."""


def interrupted_at(step):
    """A class to take the place of ``Interrupt``: Ctrl-C before a step, counted from 1 where the run goes on."""

    class InterruptedAt(Interrupt):
        checks = 0

        def check(self, on_interrupt=None):
            self.checks += 1
            self._requested = self.checks == step
            super().check(on_interrupt)

    return InterruptedAt


def killed_at(step):
    """The same for a kill."""

    class KilledAt(interrupted_at(step)):
        def check(self, on_interrupt=None):
            try:
                super().check()
            except KeyboardInterrupt:
                raise Killed from None

    return KilledAt
