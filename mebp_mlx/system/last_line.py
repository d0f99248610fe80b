"""Prints one line on stderr about a fault that kills the process before Python can report it: a signal inside MLX.

SIGBUS: a page of a mapped file is missing, because the file was truncated or its disk is gone or full. SIGSEGV: MLX's
CPU backend writes through a null pointer after malloc failed. faulthandler's signal handler writes the signal's name to
a pipe; a shell at the other end prints the line after this process has died.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

# Arguments: the last save, then pairs of a file and its size. If there was no fault, `read` fails at the end of file.
_SCRIPT = r"""
IFS= read -r fault || exit 0
cat > /dev/null
why="a fault outside Python"
case $fault in
*"Bus error"*) why="a mapped file was cut short, or the disk is full or gone" ;;
*"Segmentation fault"* | *Aborted*) why="most likely out of memory (a lower --memory-budget uses less)" ;;
esac
save=$1
shift
while [ $# -gt 1 ]; do
    n=$(($({ wc -c < "$1"; } 2> /dev/null || echo 0)))
    [ "$n" -ge "$2" ] || why="$1 was $2 bytes, is $n bytes: cut short while it was in use"
    shift 2
done
if [ -e "$save" ]; then whole="the last save, $save, is intact"; else whole="nothing is saved yet"; fi
echo "error: ${fault#Fatal Python error: }: $why; $whole" >&2
"""


class LastLine:
    """While the context is open, a fatal signal prints one line on stderr; the signal still ends the process.

    save: the file of the last save; files: {path: bytes} of the mapped files, so that the line can name a truncated
    one. Does nothing if faulthandler is already in use (python -X faulthandler) or no shell can be started.
    """

    def __init__(self, save: Path, files: Mapping[Path, int]):
        self._arguments = [str(save), *(str(part) for pair in files.items() for part in pair)]
        self._shell: subprocess.Popen[bytes] | None = None
        self._pipe = -1

    def __enter__(self) -> LastLine:
        if faulthandler.is_enabled():
            return self
        read, self._pipe = os.pipe()
        try:
            with contextlib.suppress(OSError):
                command = ["/bin/sh", "-c", _SCRIPT, "sh", *self._arguments]
                # A session of its own, so that Ctrl-C does not reach the shell.
                self._shell = subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, start_new_session=True)
                faulthandler.enable(self._pipe, all_threads=False)
        finally:
            os.close(read)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shell is not None:
            faulthandler.disable()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._shell is not None:
            self._shell.wait()
            self._shell = None
