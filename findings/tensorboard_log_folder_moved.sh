#!/usr/bin/env bash
# TensorBoard's event writer opens its file anew, by name, at every flush: where the log folder is renamed while a job
# writes, each later call raises in the job's own loop.
#
# Versions:  tensorboard 2.21.0 without TensorFlow (its own stub of file access), as torch.utils.tensorboard uses it.
# Expected:  a process goes on writing to the file that it has open; on Linux a rename of the folder does not matter.
# Behaviour: the writer's thread dies at its next flush with FileNotFoundError. The event handed over just before was
#            accepted and is lost; the flush and every later add_event raise, for good: nothing opens the file again.
# Why it matters: `mv runs/today runs/kept` beside a job that trains ends the training at the next step that is logged,
#            unless the caller catches OSError around each call.
# Output:
OUTPUT='accepted before the move: 3
accepted after it: 1
raised after it: FileNotFoundError x 4
events in the moved file: 3'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorboard==2.21.0 "setuptools<81"
cat > "$folder/moved.py" <<'EOP'
import os, sys, threading
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

threading.excepthook = lambda arguments: None  # the thread's own traceback
first, second = (os.path.join(sys.argv[1], name) for name in ("today", "kept"))


def event(step):
    return Event(wall_time=step, step=step, summary=Summary(value=[Summary.Value(tag="loss", simple_value=step)]))


writer = EventFileWriter(first, flush_secs=3600)
for step in range(3):
    writer.add_event(event(step))
writer.flush()
os.rename(first, second)
accepted, raised = 0, []
for step in range(3, 7):
    try:
        writer.add_event(event(step))
        accepted += 1
        writer.flush()
    except OSError as error:
        raised.append(type(error).__name__)
[file] = os.listdir(second)
kept = [one.step for one in EventFileLoader(os.path.join(second, file)).Load() if one.HasField("summary")]
print(f"accepted before the move: 3\naccepted after it: {accepted}\nraised after it: {raised[0]} x {len(raised)}\n"
      f"events in the moved file: {len(kept)}")
EOP
found=$("$folder/venv/bin/python" "$folder/moved.py" "$folder")
echo "$found"
[ "$found" = "$OUTPUT" ] || { echo "tensorboard behaves otherwise now" >&2; exit 1; }
