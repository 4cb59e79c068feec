"""Writes checkpoints of one uid until it is killed; prints the number of each that is finished.

python checkpoint_writer.py FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from p2pmoe.server.checkpoints import Checkpoint, Made, TensorFile
from p2pmoe.server.state_folder import StateFolder

MADE = Made(module="FFN", schema_digest="d", layout={}, optimizer="SGD", trained=[])


def main(path: Path) -> None:
    folder = StateFolder(path)
    folder.open()
    entries = folder.entries_of("ffn.1")
    updates = entries[0].updates if entries else 0
    print("begun", flush=True)
    while True:
        updates += 1
        body = [b"%d" % updates * 1000] * 100

        def describe(sequence: int, tensors: TensorFile, updates: int = updates) -> Checkpoint:
            return Checkpoint(
                uid="ffn.1",
                sequence=sequence,
                swarm="s",
                incarnation="0" * 32,
                updates=updates,
                saved_at=time.time(),
                wire_version=1,
                made=MADE,
                state={},
                tensors=tensors,
            )

        folder.write("ffn.1", body, describe)
        print(updates, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
