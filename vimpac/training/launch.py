"""torchrun that says what is needed: `python -m vimpac.training.launch [torchrun options] train.py …`.

torchrun prints a traceback of its own when a process ends with an error that the process has already explained. This runs the
same program, says what a process that was killed could not, and passes the exit status on. Unless OMP_NUM_THREADS is set, each
process gets its share of the machine's cores as threads, where torchrun gives it one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from vimpac.cores import share_of_cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments; returns 128 + n after signal n to it or a process, else the first failure's status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("multiprocessing.api", "agent.server.api", "multiprocessing.errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    options = run.parse_args(arguments)
    processes = run.determine_local_world_size(options.nproc_per_node)
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(processes)))
    try:
        run.run(options)
    except ChildFailedError as error:
        ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        killed = [(rank, code) for rank, code in ended.items() if code < 0 and code != -signal.SIGTERM]
        if not killed:  # SIGTERM is torchrun's own, to those that a failure leaves behind
            code = error.get_first_failure()[1].exitcode
            return code if code >= 0 else 128 - code
        rank, code = killed[0]  # who ended because it was gone has explained that
        print(f"rank {rank} was killed by {_cause(-code)}", file=sys.stderr)
        return 128 - code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _cause(number: int) -> str:
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"{name}: most likely this machine ran out of memory (`dmesg` tells); a smaller --micro-batch takes less"
    return name


if __name__ == "__main__":
    sys.exit(main())
