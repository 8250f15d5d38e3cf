#!/usr/bin/env python3
"""Tells Ray that this spot machine will be taken away, so that trainings save, and leave it while it still runs.

It asks the cloud's metadata service every five seconds. On a notice it drains this node with the seconds that are left,
and ends. The cluster files start it next to `ray start`:

    python spot_notifier.py aws --address $RAY_HEAD_IP:6379
    python spot_notifier.py gcp --address $RAY_HEAD_IP:6379

AWS gives two minutes, Google 30 seconds. Standard library only; `ray` must be on the PATH.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
GOOGLE_S = 25.0  # of 30, as the notice does not say when
SPARE_S = 5.0


def get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """Return the metadata service's answer; no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=2) as answer:
        return str(answer.read(10_000).decode())


def seconds_left(cloud: str, metadata: str) -> float | None:
    """Return how long this machine will be there, None if nothing is known of its end."""
    if cloud == "gcp":
        preempted = get(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return GOOGLE_S if preempted.strip() == "TRUE" else None
    token = get(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        text = get(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
    end = datetime.fromisoformat(json.loads(text)["time"])  # {"action": "terminate", "time": "2026-11-29T22:00:00Z"}
    return max(1.0, (end - datetime.now(UTC)).total_seconds() - SPARE_S)


def own_node() -> str:
    """Return the id of the Ray node on this machine, from its raylet's arguments."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = file.read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if arguments[0].endswith("/raylet"):
            return next(a.removeprefix("--node_id=") for a in arguments if a.startswith("--node_id="))
    raise RuntimeError("no raylet runs on this machine")


def main() -> int:
    """Wait for the notice, and pass it on."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cloud", choices=METADATA)
    parser.add_argument("--address", required=True, help="of Ray's head, HOST:PORT")
    parser.add_argument("--node-id", default="", help="of the node to drain; default: this machine's")
    parser.add_argument("--metadata", default="", help="address of the metadata service, for tests")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two questions")
    flags = parser.parse_args()
    metadata, left, trouble = flags.metadata or METADATA[flags.cloud], None, ""
    while left is None:
        try:
            left = seconds_left(flags.cloud, metadata)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if trouble != str(error):
                trouble = str(error)
                print(f"spot_notifier: {metadata}: {trouble}; asking again", flush=True)
        if left is None:
            time.sleep(flags.interval)
    end = time.monotonic() + left
    print(f"spot_notifier: this machine ends in {left:.0f} s", flush=True)
    while (left := end - time.monotonic()) > 0:
        try:
            command = ["ray", "drain-node", "--address", flags.address, "--node-id", flags.node_id or own_node()]
            command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
            subprocess.run([*command, "--deadline-remaining-seconds", str(int(left))], check=True, timeout=left)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            print(f"spot_notifier: {error}; once more", flush=True)
            time.sleep(1)
        else:
            print("spot_notifier: the node drains", flush=True)
            return 0
    print("spot_notifier: the node could not be drained", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
