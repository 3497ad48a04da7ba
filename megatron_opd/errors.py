"""Errors that a user can mend: each message says what, got, wanted and what to do."""


class OPDError(Exception):
    """The parent of every error that this project raises on purpose."""


class ConfigError(OPDError):
    """A setting is unknown, missing or contradicts another one."""


class DoesNotFitError(ConfigError):
    """A role needs more memory than its GPU has."""


class DataError(OPDError):
    """A prompt file holds a line that cannot be used; the message names file and line."""


class CheckpointError(OPDError):
    """A model folder lacks tensors, has unknown ones, or was written half."""


class UnsavedError(OPDError):
    """A checkpoint could not be written. No rank waits for another one, and training can go on."""


class WireError(OPDError):
    """Bytes from a peer do not decode to the message that was expected."""


class PeerError(OPDError):
    """A peer failed, vanished or stayed silent past its timeout; the message names it."""


class SetbackError(PeerError):
    """A peer could not do what it was asked, says why, and goes on."""


class UnfitError(OPDError):
    """A prompt cannot be trained on, for what became of it or of those who worked on it. The run goes on without it."""


class LearnerLostError(PeerError):
    """The learner failed or vanished. Another one may take its place, from the last checkpoint."""


class HungUpError(PeerError):
    """The controller closed the connection: something else went wrong before."""


class WeightSyncError(OPDError):
    """A weight bucket arrived late, out of order or with another digest than it was sent with."""


class GuardError(OPDError):
    """A run goes wrong by its own diagnostics: responses explode, or the student leaves the ids that are scored."""


class StalenessError(OPDError):
    """Tokens were trained on that are older than `loop.max_lag` allows: the store does not keep its bound."""
