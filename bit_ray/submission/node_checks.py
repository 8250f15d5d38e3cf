"""What the nodes of a cluster have, lack and do not have in common, each as a finding."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from bit_ray.config import from_dict
from bit_ray.errors import BitRayError
from bit_ray.submission.machine import CLIENT, Machine
from bit_ray.submission.nodes import Node, Wanted, look_at_nodes, small_file
from bit_ray.submission.refusals import local_places
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.server import probe
from bit_ray.uris import shown

_NUM_NAMED = 3


class Finding(NamedTuple):
    """What one check found."""

    check: str
    state: Literal["ok", "warning", "failed"]
    found: str | BitRayError


def check_nodes(config: Any) -> tuple[list[Node], list[Finding]]:
    """Look at every node; return what was found out about each subject."""
    storage = getattr(config, "storage", "")
    tracking = getattr(config, "tracking", None)
    findings = []
    wanted = Wanted(
        storage=storage,
        written="",
        tracking=tracking.uri if tracking is not None else "",
        paths=tuple(local_places(config)),
        cache=getattr(getattr(getattr(config, "runtime", None), "cache", None), "directory", ""),
    )
    nodes: list[Node] = []
    failed: Sequence[BitRayError] = []
    errors: dict[str, list[BitRayError]] = {}
    try:
        if storage:
            with small_file(storage) as written:
                nodes, failed = look_at_nodes(replace(wanted, written=written))
        else:
            nodes, failed = look_at_nodes(wanted)
    except BitRayError as error:
        errors["storage"] = [error]
        nodes, failed = look_at_nodes(wanted)
    for node in nodes:
        for subject, problem in node.errors.items():
            errors.setdefault(subject, []).append(problem)
    if tracking is not None:
        try:
            uri = tracking_uri(tracking.uri, storage or None)
            if not uri.startswith("sqlite:"):
                probe(uri)  # the head, where the job's driver runs
            tracker = shown(uri)
        except BitRayError as error:
            errors.setdefault("tracker", []).insert(0, error)
    findings.append(_outcome("nodes", failed, f"{len(nodes)} answer"))
    findings.append(_outcome("code", errors.get("code", ()), _machines(nodes)))
    findings += _differences(nodes)
    if storage:
        text = f"{storage}: written, read and deleted on {len(nodes)} nodes"
        findings.append(_outcome("storage", errors.get("storage", ()), text))
    if wanted.paths:
        text = f"{', '.join(path for _, path in wanted.paths)}: there on {len(nodes)} nodes"
        findings.append(_outcome("paths", errors.get("paths", ()), text))
    if tracking is not None:
        findings.append(_outcome("tracker", errors.get("tracker", ()), tracker if "tracker" not in errors else ""))
    return nodes, findings


def _outcome(check: str, errors: Sequence[BitRayError], text: str) -> Finding:
    """Return what was found; of several errors the first."""
    if not errors:
        return Finding(check, "ok", text)
    more = len(errors) - 1
    error = errors[0] if not more else errors[0].about(f"{more + 1} times")
    return Finding(check, "failed", error)


def _machines(nodes: Sequence[Node]) -> str:
    machine = nodes[0].machine if nodes else Machine.here()
    return (
        f"bit_ray {machine.code}, Python {machine.python}, Ray {machine.ray}, torch {machine.torch}, {machine.system}, "
        f"{machine.decoder} decoder"
    )


def _differences(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Yield in what nodes differ from the machine that the job came from, or from the head."""
    sent = os.environ.get(CLIENT, "")
    reference = from_dict(Machine, json.loads(sent)) if sent else Machine.here()
    origin = "the machine that submits" if sent else "the head"
    for name in ("python", "ray", "torch", "system"):
        expected = getattr(reference, name)
        others = {
            node.address: getattr(node.machine, name) for node in nodes if getattr(node.machine, name) != expected
        }
        if others:
            some = ", ".join(f"{value} on {address}" for address, value in list(others.items())[:_NUM_NAMED])
            yield Finding(name, "warning", f"{some}; {expected} on {origin}")
    plain = [node.address for node in nodes if node.machine.decoder == "plain"]
    if plain:
        text = (
            f"not the compiled one on {', '.join(plain[:_NUM_NAMED])}: photographs decode slower; use an image with "
            "bit_ray installed as a wheel, or submit from a machine with the same Python and C library"
        )
        yield Finding("decoder", "warning", text)
