# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error that reaches an operator. Each says what happened and what to do.

::

    QmpUpmError
    ├── ConfigError             a configuration file or parameter can't be used
    ├── PolicyError             a policy failed, or decided what can't be done
    ├── MeasureError            the prices of this host can't be measured
    ├── TraceError              a recorded trace can't be read or written
    ├── InstallError            a part of qmp-upm itself is not where it should be
    ├── ControlError            the control socket can't be used, or the daemon refused a command
    │   └── UnknownCommandError the daemon has no such command, or not at this moment
    ├── UnknownVmError          no VM of this name is looked after
    ├── UnavailableError        the VM is there, but can't do this at the moment
    └── PeerError               QEMU is not what it should be; the VM is tried again
        ├── LinkError           no connection, or it broke
        │   ├── TakenError      the monitor accepts, and never greets
        │   └── SilentError     a command got no answer in time
        ├── MessageError        an answer that breaks the protocol
        │   └── ExcessError     more than a peer may send
        ├── CommandError        QEMU refused a command
        └── RefusedError        QEMU can't be served as it is
            ├── PluginMissingError  it runs without the plugin
            └── OtherMonitorError   it is served at another of its monitors
"""

from qmp_upm.limits import printable


class QmpUpmError(Exception):
    """Root of all: ``message`` says what happened, ``hint`` what to do about it."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(QmpUpmError):
    """A configuration can't be used. Nothing was started with it."""


class PolicyError(QmpUpmError):
    """A policy raised, or returned what is no decision. Its VM goes on with ``eager``."""


class MeasureError(QmpUpmError):
    """What ``calibrate`` needs of the host is not to be had."""


class TraceError(QmpUpmError):
    """A file of recorded conversions is damaged, foreign, or can't be read or written."""


class InstallError(QmpUpmError):
    """A file that belongs to the installation is missing."""


class ControlError(QmpUpmError):
    """The control socket can't be reached or made, or the daemon refused a command."""


class UnknownCommandError(ControlError):
    """A client named a command that there is not, or not before negotiation."""


class UnknownVmError(QmpUpmError):
    """The daemon looks after no VM of this name."""


class UnavailableError(QmpUpmError):
    """The VM is known, but is not attached, or did not do it in time."""


class PeerError(QmpUpmError):
    """This VM can't be served at the moment. Others are not concerned.

    The message may have words of QEMU's in it, and is cut as `qmp_upm.limits` says.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(printable(message), hint=hint)


class LinkError(PeerError):
    """The monitor can't be reached, or went away."""


class TakenError(LinkError):
    """The monitor accepts connections and does not greet: another client holds it."""


class SilentError(LinkError):
    """QEMU greeted, and left a command without an answer for too long."""


class MessageError(PeerError):
    """QEMU, or what answers for it, broke the protocol or contradicts itself."""


class ExcessError(MessageError):
    """A peer has sent more than `qmp_upm.limits` lets it. It is left alone for a while."""


class CommandError(PeerError):
    """QEMU answered a command with an error."""


class RefusedError(PeerError):
    """QEMU answers, and can't be served before something else changes."""


class PluginMissingError(RefusedError):
    """QEMU runs, but the plugin is not loaded in it."""


class OtherMonitorError(RefusedError):
    """A process is served at one of its monitors only."""
