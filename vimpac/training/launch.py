"""torchrun that ends as quietly as the processes it started: `python -m vimpac.training.launch [torchrun options] train.py …`.

torchrun prints a traceback of its own when a process ends with an error that the process has already explained. This runs the
same program and passes the exit status on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments; returns the exit status of the process that failed first, 128 + n after a signal."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("multiprocessing.api", "agent.server.api", "multiprocessing.errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
