"""The one exception that means 'the user can fix this': commands print it as one line and exit with status 1."""

import errno


class InputError(ValueError):
    """A bad file, option or shape. Its message names the value, what was expected and the way out."""


FIXABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
"""Numbers of an OSError that the user can fix as well: no room, a folder that is not theirs, a path that leads nowhere."""
