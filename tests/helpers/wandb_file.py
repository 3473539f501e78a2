"""Read an offline W&B run back: a file of records in LevelDB's log format, each a protobuf of wandb's own."""

import json
import struct
import time
from pathlib import Path

BLOCK, HEADER = 32768, 7  # bytes; a record's header holds its checksum, length and type; the file's own is as long


def records(path):
    """The whole records of the file, in order; a killed run's last one may be missing."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = Path(path).read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def _items(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read(path):
    """The run's id, group, tags, config, rows of history, summary, axes, and the path and MD5 of each artifact's files."""
    run = {"id": None, "name": None, "config": {}, "history": [], "summary": {}, "axes": {}, "artifacts": {}, "exit": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"id": record.run.run_id, "name": record.run.display_name, "project": record.run.project}
            run |= {"group": record.run.run_group, "job_type": record.run.job_type, "tags": list(record.run.tags)}
            run["config"] |= _items(record.run.config.update)
        elif kind == "config":
            run["config"] |= _items(record.config.update)
        elif kind == "history":
            run["history"].append(_items(record.history.item))
        elif kind == "summary":
            run["summary"] |= _items(record.summary.update)
        elif kind == "metric":
            run["axes"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            files = {file.path: (Path(file.local_path), file.digest) for file in record.artifact.manifest.contents}
            run["artifacts"][record.artifact.type] = files
        elif kind == "exit":
            run["exit"] = record.exit.exit_code
    return run


def read_finished(path, seconds=20):
    """The run, once it is whole on the disk: W&B's service writes the end after ``finish()`` has returned."""
    end = time.monotonic() + seconds
    while (run := read(path))["exit"] is None and time.monotonic() < end:
        time.sleep(0.05)
    return run
