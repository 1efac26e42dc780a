"""torchrun with readable errors: `python -m vimpac.training.launch [torchrun options] train.py …`.

torchrun prints its own traceback even for an error that a process has already explained, and when its port is taken. This runs
the same program, reports processes that were killed, and passes the exit status on. Unless OMP_NUM_THREADS is set, each process
gets its share of the machine's cores as threads, instead of torchrun's single thread.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vimpac.console import printable
from vimpac.processes.limits import share_of_cores
from vimpac.processes.ranks import LAUNCHER

if TYPE_CHECKING:  # it imports torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments. Returns 128 + n if signal n ended it or a process, else the first failure's status."""
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    for name in ("multiprocessing.api", "agent.server.api", "multiprocessing.errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    options = run.parse_args(arguments)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        processes = run.determine_local_world_size(options.nproc_per_node)
        if processes > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(processes)))
        run.run(options)
    except ChildFailedError as error:
        return _status(error)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except (DistError, RendezvousError) as error:
        where = f"{options.master_addr}:{options.master_port}"
        print(f"error: {_why_not_started(error, options.rdzv_endpoint or where)}", file=sys.stderr)
        return 1
    return 0


def _status(error: ChildFailedError) -> int:
    """The exit status for failed processes. Reports one that was killed."""
    ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
    killed = [(rank, code) for rank, code in ended.items() if code < 0 and code != -signal.SIGTERM]
    if not killed:  # torchrun itself sends SIGTERM to the remaining processes after a failure
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    rank, code = killed[0]  # the others have reported that they lost it
    print(f"rank {rank} was killed by {_cause(-code)}", file=sys.stderr)
    return 128 - code


def _cause(number: int) -> str:
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        why = "most likely this machine ran out of memory (`dmesg` shows it)"
        return f"{name}: {why}; a smaller --micro-batch needs less"
    return name


def _why_not_started(error: Exception, where: str) -> str:
    from vimpac.processes.meeting import port_taken

    said = " ".join(str(error.__cause__ or error).split())
    if "EADDRINUSE" in said or "already in use" in said:
        return port_taken(where)
    return printable(f"torchrun cannot meet at {where}: {said[:300]}")


if __name__ == "__main__":
    sys.exit(main())
